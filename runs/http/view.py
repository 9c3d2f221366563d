"""The one gate. A view's methods are operations; each says what it takes, what it answers and whom it lets in.

    class OneRun(View):
        @operation(sees(Run), query=Nothing, answers={200: answers.Run})
        def get(self, request, run): ...

An operation's access rule is applied before its method runs, and what it reads is checked by its forms: what is not visible
is 404, what may not be done 403. A method without a rule cannot be routed: `as_view` refuses its view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, TypeVar, cast
from uuid import UUID

from django.contrib.auth.models import AnonymousUser
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed
from django.db import connections, transaction
from django.db.models import Model
from django.http import Http404, HttpRequest, HttpResponseBase
from pydantic import BaseModel
from rest_framework.authentication import BaseAuthentication, SessionAuthentication
from rest_framework.exceptions import APIException, MethodNotAllowed, NotAuthenticated, PermissionDenied
from rest_framework.negotiation import BaseContentNegotiation
from rest_framework.parsers import BaseParser
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.settings import api_settings
from rest_framework.throttling import BaseThrottle
from rest_framework.views import APIView

from runs.access import visible
from runs.http import errors
from runs.http.body import Body
from runs.http.json import JSONRenderer
from runs.http.query import read_query
from runs.http.schema import Schema
from runs.http.throttles import Rate, StartRate
from runs.models import Run
from threads import access
from threads.authentication import ApiKeyAuthentication, signed_in
from threads.database import apart
from threads.models import Message
from tools.models import ToolCall

METHODS = ("get", "post", "put", "patch", "delete")
Handler = TypeVar("Handler", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Rule:
    """Whom an operation lets in. `verb` is asked of the policy, about the row of `of` that the URL names (None: a new one).

    With `of` None and the verb "" whoever has signed in may; what they see is the operation's own affair. `public`: anybody.
    """

    verb: str = ""
    of: type[Model] | None = None
    public: bool = False


PUBLIC = Rule(public=True)
SIGNED_IN = Rule()


def sees(model: type[Model]) -> Rule:
    """Whoever may see the row that the URL names."""
    return Rule("view", model)


def may(verb: str, model: type[Model] | None = None) -> Rule:
    """Whoever sees the row and may do this to it."""
    return Rule(verb, model)


@dataclass(frozen=True)
class Operation:
    """What a method takes and answers. `answers`: by status, a model, a content type, or None for an empty body."""

    rule: Rule
    query: type[BaseModel] | None = None
    body: type[BaseModel] | None = None
    answers: Mapping[int, Any] = field(default_factory=dict)
    creates: bool = False
    raises: tuple[int, ...] = ()
    name: str = ""


def operation(rule: Rule, **told: Any) -> Callable[[Handler], Handler]:
    """Make a method an operation: see `Operation`. It is called with the row, the query and the body that it asked for."""
    said = Operation(rule, **told)

    def mark(handler: Handler) -> Handler:
        handler.__operation__ = said  # type: ignore[attr-defined]
        return handler

    return mark


class Unread(BaseParser):
    """Leaves the body where it is: `Body` reads it. DRF asks too, for a CSRF token in a form, and finds none."""

    media_type = "*/*"

    def parse(self, stream: Any, media_type: str | None = None, parser_context: Any = None) -> Any:
        return {}


class OnlyJSON(BaseContentNegotiation):
    """One form of answers, whatever is accepted: a client that cannot read JSON reads no error either."""

    def select_parser(self, request: Request, parsers: Any) -> Any:
        return parsers[0] if parsers else None

    def select_renderer(self, request: Request, renderers: Any, format_suffix: str | None = None) -> Any:
        return renderers[0], renderers[0].media_type


@cache
def of_the_host() -> tuple[type[BaseAuthentication], ...]:
    """Return the authentication classes that the host's settings name; DRF's own defaults let passwords in."""
    if "DEFAULT_AUTHENTICATION_CLASSES" not in api_settings.user_settings:
        return ()
    named: Any = api_settings.DEFAULT_AUTHENTICATION_CLASSES  # imported by now, though its type says names
    return tuple(named)


def _forget(*, setting: str, **_: object) -> None:
    if setting == "REST_FRAMEWORK":
        of_the_host.cache_clear()


setting_changed.connect(_forget, dispatch_uid="longhaul.runs.http.view")


class View(APIView):
    """A resource of the API. The host's own DRF settings change nothing of it but who is signed in."""

    renderer_classes = (JSONRenderer,)
    parser_classes = (Unread,)
    permission_classes = ()
    throttle_classes: Sequence[type[BaseThrottle]] = (Rate, StartRate)
    content_negotiation_class = OnlyJSON
    metadata_class = None
    versioning_class = None
    schema = Schema()
    http_method_names: ClassVar[list[str]] = [*METHODS, "head", "options"]  # type: ignore[misc]
    streams = False  # whether it answers with streams: `runs.streams` lets its readers in by a shorter way

    @classmethod
    def operations(cls) -> dict[str, Operation]:
        """Return the operations by method. Raises ImproperlyConfigured for a method without a rule."""
        found = {}
        for method in METHODS:
            handler = getattr(cls, method, None)
            if handler is None:
                continue
            said = getattr(handler, "__operation__", None)
            if said is None:
                raise ImproperlyConfigured(f"{cls.__name__}.{method} has no access rule: make it an @operation.")
            found[method] = said
        return found

    @classmethod
    def as_view(cls, **initkwargs: Any) -> Any:
        cls.operations()
        view = super().as_view(**initkwargs)
        return _outside_of_transactions(view) if cls.streams else view

    def get_authenticators(self) -> list[BaseAuthentication]:
        kinds: tuple[type[BaseAuthentication], ...] = (ApiKeyAuthentication, SessionAuthentication, *of_the_host())
        return [kind() for kind in dict.fromkeys(kinds)]

    def get_exception_handler(self) -> Any:
        return errors.handle

    @property
    def allowed_methods(self) -> list[str]:
        found = [method.upper() for method in self.operations()]
        return [*found, "HEAD"] if "GET" in found else found

    def operation(self, request: Request) -> Operation | None:
        return self.operations().get(_method(request))

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        request.accepted_renderer = self.get_renderers()[0]
        request.accepted_media_type = request.accepted_renderer.media_type
        said = self.operation(request)
        if said.rule.public if said is not None else all(each.rule.public for each in self.operations().values()):
            # Nobody is asked who they are: the service says that it is alive also when the database is not.
            request.user, request.auth = AnonymousUser(), None
            self.check_throttles(request)
        else:
            self._sign_in(request)
        if said is None:
            raise MethodNotAllowed(request.method or "")
        self.given = self._given(request, said, kwargs)

    def _sign_in(self, request: Request) -> None:
        """Raises NotAuthenticated, AuthenticationFailed, PermissionDenied (CSRF), Throttled."""
        try:
            self.perform_authentication(request)
        except APIException:
            self.check_throttles(request)  # wrong keys are counted too, by the address that sends them
            raise
        self.check_throttles(request)
        if not signed_in(request):
            raise NotAuthenticated

    def _given(self, request: Request, said: Operation, named: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the operation is called with. Who may not is told so before what they sent is looked at."""
        given: dict[str, Any] = {}
        if said.rule.of is not None:
            name = said.rule.of._meta.model_name or ""
            given[name] = self._row(request, said.rule, named["id"])
        elif said.rule.verb and not access.may(request.user, said.rule.verb):
            raise PermissionDenied
        given |= {key: value for key, value in named.items() if key != "id"}
        query = read_query(said.query, request.query_params)
        if said.query is not None:
            given["query"] = query
        if said.body is not None:
            self.body = Body.read(request._request)
            given["body"] = self.body.form(said.body)
        return given

    def _row(self, request: Request, rule: Rule, id: UUID) -> Model:
        assert rule.of is not None
        row = next(iter(visible(rule.of, request.user).filter(pk=id).order_by()[:1]), None)  # unsorted: of one row
        if row is None:
            raise Http404
        if rule.verb != "view" and not access.may(request.user, rule.verb, policed(row)):
            raise PermissionDenied
        return row

    def dispatch(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        asked = self._begun(request, *args, **kwargs)
        response: HttpResponseBase
        try:
            self.initial(asked, *args, **kwargs)
            response = self._handler(asked)(asked, **self.given)
        except Exception as error:
            response = self.handle_exception(error)
        return self._finished(asked, response)

    def _begun(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Request:
        self.args, self.kwargs = args, kwargs
        asked = self.initialize_request(request, *args, **kwargs)
        self.request = asked
        self.headers = self.default_response_headers
        return asked

    def _handler(self, request: Request) -> Callable[..., Any]:
        handler: Callable[..., Any] = getattr(self, _method(request))
        return handler

    def _finished(self, request: Request, response: HttpResponseBase) -> HttpResponseBase:
        finished = self.finalize_response(request, cast(Response, response), *self.args, **self.kwargs)
        self.response = finished
        return finished


class AsyncView(View):
    """A resource that waits: its methods are coroutines, and hold neither a thread nor a connection while they do."""

    @classmethod
    def as_view(cls, **initkwargs: Any) -> Any:
        # A host with ATOMIC_REQUESTS cannot have a transaction around a coroutine: Django refuses.
        return _outside_of_transactions(super().as_view(**initkwargs))

    async def dispatch(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:  # type: ignore[override]
        asked = self._begun(request, *args, **kwargs)
        response: HttpResponseBase
        try:
            await apart(self.initial)(asked, *args, **kwargs)
            response = await self._handler(asked)(asked, **self.given)
        except Exception as error:
            response = await apart(self.handle_exception)(error)
        return self._finished(asked, response)


def _outside_of_transactions(view: Any) -> Any:
    for alias in connections:
        view = transaction.non_atomic_requests(using=alias)(view)
    return view


def _method(request: Request) -> str:
    """Name the method that answers: a HEAD is a GET whose body nobody wants."""
    method = (request.method or "").lower()
    return "get" if method == "head" else method


def policed(row: Model) -> Model:
    """Return the thread that a message follows, the run that a call follows; any other row is asked about itself."""
    if isinstance(row, ToolCall):
        return Run.objects.get(pk=row.run_id)
    return row.thread if isinstance(row, Message) else row
