"""A kind of index that Django has only in `django.contrib.postgres`."""

from __future__ import annotations

from typing import Any

from django.db import models
from django.db.backends.base.schema import BaseDatabaseSchemaEditor
from django.db.backends.ddl_references import Statement


class Gin(models.Index):
    """A GIN index without a list of pending entries, which every query would have to read through.

    Django's own is an error (postgres.E005, from 6.1 on) where `django.contrib.postgres` is none of the host's apps; that
    nothing else of ours needs.
    """

    suffix = "gin"

    def create_sql(
        self, model: type[models.Model], schema_editor: BaseDatabaseSchemaEditor, using: str = "", **kwargs: Any
    ) -> Statement:
        statement = super().create_sql(model, schema_editor, using=" USING gin", **kwargs)
        parts: dict[str, Any] = statement.parts
        parts["extra"] = f" WITH (fastupdate = off){parts['extra']}"
        return statement
