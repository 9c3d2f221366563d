"""What can go wrong with a tool, and how its author says so.

    ToolError
    ├── said by tool authors, while the tool runs
    │   ├── ModelRetry            failed; the model reads why and may try otherwise
    │   ├── ToolFailed            failed for good
    │   │   ├── InvalidResult     it ran, but its result cannot be JSON (said by us)
    │   │   └── HookFailed        what runs around it failed (said by us)
    │   ├── ApprovalRequired      a person must decide first
    │   └── WorkerLeaving         its worker shuts down: begin again elsewhere
    ├── said to the model, about a call it asked for
    │   ├── ToolNotAvailable      no fault of the model's
    │   ├── UnknownTool           (LookupError)
    │   ├── NotParallel           one call at a time
    │   └── InvalidArguments      (ValueError)
    └── said to the programmer, at import
        ├── ToolSchemaError       (TypeError) a signature that cannot be a schema
        ├── ToolOptionError       (ValueError) options that exclude each other
        └── DuplicateTool         (ValueError) two tools of one name

    LonghaulError (threads.exceptions), said to who answers for a call
    ├── AlreadySettled            somebody was first; nothing was changed
    └── NotAwaited                the call is open, and waits for no such answer

None of them is retried by a `RetryPolicy`: each says that the same call would end the same way.
`str(error)` is written for its reader; `code` is what stands in `error.code` of a settled call.
The classes survive pickling, for a prefork worker may send them to its parent.
"""

from collections.abc import Iterable, Sequence
from inspect import getdoc
from typing import ClassVar, TypedDict

from threads.exceptions import LonghaulError


class ToolError(Exception):
    """A tool could not be used."""

    code: ClassVar[str] = "tool_error"

    def __init__(self, message: str = "") -> None:
        super().__init__(message or (getdoc(type(self)) or "").partition("\n\n")[0])


class ModelRetry(ToolError):
    """The call did not work as asked; try it another way.

    Raised by a tool for what the model can mend: "No order 1042; did you mean 1024?". The call settles as
    failed and its text goes to the model, which may call again.
    """

    code = "model_retry"


class ToolFailed(ToolError):
    """The tool failed, and calling it again will not help.

    Raised by a tool for what nobody can mend now. The call settles as failed at once, without another attempt.
    """

    code = "tool_failed"


class ToolNotAvailable(ToolError):
    """The tool cannot be run where it was asked for."""

    code = "not_available"


class InvalidResult(ToolFailed):
    """The tool ran, but what it returned cannot be written as JSON."""

    code = "invalid_result"


class HookFailed(ToolFailed):
    """A hook around the tool failed, so that the call has no result."""

    code = "hook_failed"


class ApprovalRequired(ToolError):
    """A person has to approve this call first.

    Raised by a tool before it has done anything: the call waits for a decision, and then runs from its start.
    The message tells the person why.
    """

    code = "approval_required"


class WorkerLeaving(ToolError):
    """The worker that runs this tool shuts down: the call is given back, and begins again on another one.

    Raised by a long tool that sees `ctx.stopping`, or in one with `on_deploy="give_back"`. It costs none of the call's
    attempts. A tool with `idempotent=False` must not start twice: there it is an error like others.
    """

    code = "worker_leaving"


class UnknownTool(ToolError, LookupError):
    """There is no tool of that name."""

    code = "unknown_tool"

    def __init__(self, name: str = "", known: Iterable[str] = ()) -> None:
        super().__init__()
        self.name = name
        self.known = tuple(known)
        self.args = (name, self.known)

    def __str__(self) -> str:
        tools = f"Use one of: {', '.join(self.known)}." if self.known else "This run has no tools."
        return f"There is no tool named {self.name!r}. {tools}"


class NotParallel(ToolError):
    """Not run: one call at a time, and another of this answer was. Call it again, alone, if it is still needed."""

    code = "not_parallel"


class Problem(TypedDict):
    """One thing wrong with the arguments of a call.

    `path` is where: `amount`, `lines[2].price`, or empty for the arguments as a whole.
    """

    path: str
    message: str


class InvalidArguments(ToolError, ValueError):
    """The arguments do not fit the tool's parameters."""

    code = "invalid_arguments"
    SHOWN: ClassVar[int] = 10

    def __init__(self, tool: str = "", problems: Sequence[Problem] = ()) -> None:
        super().__init__()
        self.args = (tool, list(problems))
        self.tool = tool
        self.problems: list[Problem] = list(problems)

    def __str__(self) -> str:
        """Return what the model reads: every problem on a line of its own, the first `SHOWN` of them."""
        lines = [f"The arguments of {self.tool or 'the tool'} are not valid; nothing was done."]
        for problem in self.problems[: self.SHOWN]:
            lines.append(f"- {problem['path']}: {problem['message']}" if problem["path"] else f"- {problem['message']}")
        if len(self.problems) > self.SHOWN:
            lines.append(f"- and {len(self.problems) - self.SHOWN} more")
        return "\n".join(lines)


class ToolSchemaError(ToolError, TypeError):
    """The signature of this tool cannot become a JSON schema."""

    code = "configuration"

    def __init__(self, tool: str = "", problem: str = "", parameter: str | None = None) -> None:
        super().__init__()
        self.args = (tool, problem, parameter)
        self.tool = tool
        self.problem = problem
        self.parameter = parameter

    def __str__(self) -> str:
        where = f"Tool {self.tool!r}" + (f", parameter {self.parameter!r}" if self.parameter else "")
        return f"{where}: {self.problem or 'its signature cannot become a JSON schema.'}"


class ToolOptionError(ToolError, ValueError):
    """The options of this tool exclude each other."""

    code = "configuration"


class DuplicateTool(ToolError, ValueError):
    """Two tools of one agent have the same name."""

    code = "configuration"


class AlreadySettled(LonghaulError):
    """The call is settled already. Nothing was changed."""

    code = "already_settled"


class NotAwaited(LonghaulError):
    """The call waits for no answer. Nothing was changed."""

    code = "not_awaited"
