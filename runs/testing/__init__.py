"""What stands behind `runs.pytest_longhaul`: a model that follows a script, and a worker within the test."""
