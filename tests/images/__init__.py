"""The image and the compose file, read and run without an engine.

compose.py      the compose file as an engine would see it: variables put in, anchors resolved
dockerfile.py   the Dockerfile's steps, replayed in folders
pod.py          processes in such a folder: by chroot, in namespaces of Linux, with the hosts of the compose file
"""
