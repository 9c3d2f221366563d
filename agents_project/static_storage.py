"""Where `collectstatic` puts the static files: beside each a copy named by its content, and a smaller one for browsers."""

from __future__ import annotations

from whitenoise.storage import CompressedManifestStaticFilesStorage  # type: ignore[import-untyped]


class NamedByContent(CompressedManifestStaticFilesStorage):  # type: ignore[misc]
    """A browser keeps a copy for ever, for other content has another name.

    A file that was not collected keeps its own name, so pages are whole before the first `collectstatic`, and a page
    with a file that is missing is a page without it and no error 500.
    """

    def stored_name(self, name: str) -> str:
        found: str = self.hashed_files.get(self.hash_key(self.clean_name(name)), name)
        return found
