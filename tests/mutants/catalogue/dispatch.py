"""Publishing: after the commit, and never instead of it."""

from __future__ import annotations

from tests.mutants.catalogue.places import PUBLISHED, START
from tests.mutants.mutant import Change, Exempt, Group, Mutant, one

_LOOK = (
    "                if idempotency_key is not None and (known := _known(busy, *keyed)):\n"
    "                    return known\n"
)
_LATE_LOOK = "        except (IntegrityError, ThreadBusy, NothingToDo) as error:\n"

PUBLISH = Group(
    "Publish after commit",
    [
        one(
            "start_publishes_before_its_commit",
            "A run's first message is sent after the commit that starts it.",
            "runs/admission.py",
            "    transaction.on_commit(after_commit)\n",
            "    after_commit()\n",
            f"{START}a_start_in_a_transaction_that_rolls_back_was_never_there",
            model="publish_before_commit",
        ),
        Mutant(
            "publish_before_commit",
            "The messages of a step's calls are sent after its commit.",
            [
                Change(
                    "runs/engine.py",
                    "            self.claim.check_lost()  # an answer that is whole",
                    "            self._publish_calls(calls, None)\n            self.claim.check_lost()  # an answer that is whole",
                ),
                Change(
                    "runs/engine.py",
                    '        if outcome["status"] == "waiting":\n            self._publish_calls(calls, outcome.get("out"))\n',
                    "",
                ),
            ],
            [f"{PUBLISHED}the_calls_of_a_step_are_published_when_they_are_rows"],
            model="publish_before_commit",
        ),
        one(
            "cancel_announced_before_its_commit",
            "A cancel is announced after its commit.",
            "runs/admission.py",
            "            transaction.on_commit(lambda: announce(answer))\n    run.refresh_from_db()",
            "            announce(answer)\n    run.refresh_from_db()",
            f"{PUBLISHED}a_cancel_in_a_transaction_that_rolls_back_was_never_there",
            model="publish_before_commit",
        ),
        one(
            "bell_of_a_tool_before_its_commit",
            "What a tool tells its readers rings after the commit.",
            "runs/run_log.py",
            "            transaction.on_commit(lambda: bells.ring([bells.run_channel(run_id)]))\n",
            "            bells.ring([bells.run_channel(run_id)])\n",
            f"{PUBLISHED}what_a_tool_tells_its_readers_rings_after_its_commit_and_never_when_it_is_rolled_back",
        ),
        one(
            "join_is_not_published",
            "The join publishes the run that it has queued.",
            "runs/admission.py",
            '        if answer.get("dispatch_seq") is not None and not answer.get("lingering"):\n',
            "        if False:\n",
            f"{PUBLISHED}the_join_publishes_the_run_at_once",
        ),
        one(
            "released_run_is_not_published",
            "The end of a run publishes the one that it has released.",
            "runs/admission.py",
            '    if released := answer.get("released"):\n',
            '    if released := answer.get("nobody"):\n',
            f"{PUBLISHED}the_end_of_a_run_publishes_the_one_that_it_releases",
        ),
        one(
            "reclaimed_call_is_not_published",
            "A reclaim publishes the call that it has requested again.",
            "runs/admission.py",
            '    if call := answer.get("publish_call"):\n',
            '    if call := answer.get("nothing"):\n',
            f"{PUBLISHED}a_call_that_is_reclaimed_is_published_at_once",
        ),
        Mutant(
            "two_runs_of_one_key",
            "The same key of the same owner and the same request give the same run.",
            [
                Change("runs/admission.py", _LOOK + "                return _insert", "                return _insert"),
                Change("runs/admission.py", _LATE_LOOK, "        except ZeroDivisionError as error:\n"),
            ],
            [f"{START}a_key_is_its_owners"],
        ),
        one(
            "key_used_between_look_and_insert",
            "Also when somebody uses the key between the look and the insert.",
            "runs/admission.py",
            _LATE_LOOK,
            "        except ZeroDivisionError as error:\n",
            f"{START}a_key_that_is_used_between_the_look_and_the_insert_gives_the_run_of_the_faster",
        ),
    ],
    [
        Exempt(
            "key_looked_for_before",
            "A start looks for its key before it inserts.",
            "The unique index on (owner, key) refuses the second run, and the start then looks: the first look only saves that.",
            together="two_runs_of_one_key",
        ),
        Exempt(
            "inv5_as_written",
            "A call is never run again while its worker lives.",
            "No rule of the code: an older wording of invariant 5, which no protocol can keep (a stopped process lives). The model"
            " shows that; invariant 5 says `present` now.",
            model="inv5_as_written",
        ),
    ],
)
