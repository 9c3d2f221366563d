"""Bare DRF as its documentation writes it: generic views with a serializer, the key's owner, JSON in and out."""

from __future__ import annotations

from typing import Any, ClassVar

from django.db.models import QuerySet
from rest_framework import generics, serializers
from rest_framework.parsers import JSONParser
from rest_framework.permissions import IsAuthenticated
from rest_framework.renderers import JSONRenderer

from benchmarks.bare_drf.models import Note
from threads.authentication import ApiKeyAuthentication


class NoteSerializer(serializers.ModelSerializer[Note]):
    class Meta:
        model = Note
        fields: ClassVar = ["id", "owner", "body", "created_at"]
        read_only_fields: ClassVar = ["owner"]


class _OfTheOwner(generics.GenericAPIView[Note]):
    serializer_class = NoteSerializer
    authentication_classes = (ApiKeyAuthentication,)
    permission_classes = (IsAuthenticated,)
    parser_classes = (JSONParser,)
    renderer_classes = (JSONRenderer,)

    def get_queryset(self) -> QuerySet[Note]:
        return Note.objects.filter(owner=self.request.user.pk)


class Notes(_OfTheOwner, generics.CreateAPIView[Note]):
    """Insert a row."""

    def perform_create(self, serializer: Any) -> None:
        serializer.save(owner=self.request.user)


class OneNote(_OfTheOwner, generics.RetrieveAPIView[Note]):
    """Read a row."""
