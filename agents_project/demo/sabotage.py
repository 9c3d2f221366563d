"""Who is killed, and when: in the middle of what a worker does, never between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from uuid import UUID

from agents_project.demo.supervisor import POOLS, Kill, Supervisor
from runs.models import Event, Leg, Run, Status
from threads.clock import now
from tools.models import CallStatus, ToolCall

KINDS = ("agents", "tools")
# Committed steps before each kill: far from each other, and from both ends.
AT_STEP = {"agents": 8, "tools": 26}
# Only a leg as young as this is hit, for the job is to show legs that end because their time is up, too.
_YOUNG = timedelta(seconds=1.5)
# An agents worker makes its model client after it is present: one killed before its peer has would prove nothing.
_SETTLED = timedelta(seconds=2)
_MIDDLE = timedelta(milliseconds=80)  # a call that runs for so long is in its middle


@dataclass
class Sabotage:
    """The kills to come, in order. `look` is called again and again, and kills when the moment has come."""

    supervisor: Supervisor
    run: UUID
    kinds: Sequence[str] = KINDS
    done: list[Kill] = field(default_factory=list)

    @property
    def next(self) -> str | None:
        return self.kinds[len(self.done)] if len(self.done) < len(self.kinds) else None

    def look(self) -> Kill | None:
        """Kill if it is time to. The caller starts the replacement: at once, so that nothing waits for it longer."""
        if self.next is None:
            return None
        run = Run.objects.filter(pk=self.run).only("status", "steps", "holder", "pending_message_id").get()
        young = Leg.objects.filter(run=run, number__gt=1, ended_at=None, started_at__gt=now() - _YOUNG)
        if run.steps < AT_STEP[self.next] or not young.exists():
            return None
        if not self._replaceable(self.next):
            return None
        kill = self._cut_stream(run) if self.next == "agents" else self._cut_call()
        if kill is not None:
            self.done.append(kill)
        return kill

    def _replaceable(self, kind: str) -> bool:
        """Say whether others can go on at once: of each kind one is there; of agents two, for tools one stands by."""
        there = Counter(self.supervisor.kinds[name] for name in self.supervisor.present(_SETTLED))
        if not all(there[each] for each in POOLS):
            return False
        return there[kind] > 1 if kind == "agents" else self.supervisor.stands_by(kind)

    def _cut_stream(self, run: Run) -> Kill | None:
        """Kill the agents worker that holds the run while its model speaks: some text is out, nothing committed."""
        message = run.pending_message_id
        if message is None:
            return None

        def streams() -> bool:
            speaking = Run.objects.filter(
                pk=run.pk, status=Status.RUNNING, holder=run.holder, pending_message_id=message
            ).exists()
            return speaking and Event.objects.filter(run=run, message_id=message, ordinal__isnull=False).exists()

        return self._kill(run.holder, message, streams)

    def _cut_call(self) -> Kill | None:
        """Kill the tools worker that is in the middle of a call."""
        running = ToolCall.objects.filter(run_id=self.run, status=CallStatus.RUNNING)
        call = running.filter(claimed_at__lt=now() - _MIDDLE).only("holder", "attempt").first()
        if call is None:
            return None
        same = running.filter(pk=call.pk, attempt=call.attempt, holder=call.holder)
        return self._kill(call.holder, call.pk, same.exists)

    def _kill(self, holder: UUID | None, cut: UUID, busy: Callable[[], bool]) -> Kill | None:
        return self.supervisor.kill_while(holder, cut, busy) if holder is not None and busy() else None
