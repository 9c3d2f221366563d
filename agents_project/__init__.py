"""The Django project: the only place that knows everything.

Nothing is imported here, so that `agents_project.embedded` starts fast.
"""
