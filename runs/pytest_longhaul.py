"""The pytest plugin for projects that use Longhaul."""
