"""The agent and its tools in plain TestCases: no worker, no broker, no model service. `manage.py test` runs these too."""

from datetime import timedelta
from decimal import Decimal
from itertools import pairwise
from unittest import mock

from django.contrib.auth.models import User
from django.core import mail
from django.test import TestCase

from desk import carrier
from desk.agents import support
from desk.models import Note, Order, Refund, Ticket
from runs import Run
from runs.providers.port import ProviderError, UsageReported
from runs.pytest_longhaul import WorkerKilled, assert_invariants, call, move_clock, run_to_end, scripted
from tools import ToolCall


class DeskTest(TestCase):
    """Ada has two orders. Every test ends with a database in which nothing is broken."""

    ada: User
    order: Order

    @classmethod
    def setUpTestData(cls) -> None:
        cls.ada = User.objects.create_user("ada", "ada@example.com")
        cls.order = Order.objects.create(number=1042, customer=cls.ada, state="shipped", cents=5000)
        Order.objects.create(number=1043, customer=cls.ada, cents=900)
        Order.objects.create(number=7000, customer=User.objects.create_user("eve"), cents=100)

    def tearDown(self) -> None:
        assert_invariants()

    def calls(self, run: Run) -> list[tuple[str, str, str]]:
        """What became of the calls: name, outcome, and the code of an error."""
        found = ToolCall.objects.filter(run_id=run.pk).order_by("step", "index")
        return [(each.name, each.outcome, (each.error or {}).get("code", "")) for each in found]


class AnswerTest(DeskTest):
    def test_it_looks_the_order_up_and_answers(self) -> None:
        with scripted(call("look_up_order", number=1042), "It is on its way.") as model:
            run = run_to_end(support.start("Where is order 1042?", owner=self.ada))
        self.assertEqual((run.status, run.stop_reason, run.output), ("completed", "end_turn", "It is on its way."))
        result = model.shown()[-1]["content"][0]["result"]
        self.assertEqual(result, {"number": 1042, "state": "shipped", "cents": 5000})

    def test_it_never_sees_the_order_of_somebody_else(self) -> None:
        with scripted(call("look_up_order", number=7000), "I do not find it.") as model:
            run = run_to_end(support.start("Where is order 7000?", owner=self.ada))
        self.assertEqual(self.calls(run), [("look_up_order", "failed", "model_retry")])
        self.assertIn("There are: 1042, 1043.", str(model.shown()[-1]))

    def test_two_orders_are_looked_up_in_parallel(self) -> None:
        both = [call("look_up_order", number=1042), call("look_up_order", number=1043)]
        with scripted(["I look at both. ", *both], "One is shipped, one is paid.") as model:
            run = run_to_end(support.start("What of my orders?", owner=self.ada))
        self.assertEqual((run.steps, len(self.calls(run))), (2, 2))
        states = [message["content"][0]["result"]["state"] for message in model.shown()[-2:]]
        self.assertEqual(states, ["shipped", "paid"])

    def test_who_is_urgent_gets_a_short_answer(self) -> None:
        run = support.start("Where is order 1042?", owner=self.ada)
        Ticket.objects.create(customer=self.ada, subject="Parcel", thread=run.thread, urgent=True)
        with scripted("On its way.") as model:
            run_to_end(run)
        self.assertIn("be short", model.requests[0].instructions)

    def test_a_call_that_cannot_be_is_told_to_the_model(self) -> None:
        bad = [call("look_up_order", number="many"), call("delete_everything")]
        with scripted(bad, "I cannot do that.") as model:
            run = run_to_end(support.start("Delete everything.", owner=self.ada))
        self.assertEqual([code for _, _, code in self.calls(run)], ["invalid_arguments", "unknown_tool"])
        self.assertIn("There is no tool named 'delete_everything'", str(model.shown()[-1]))
        self.assertEqual(run.status, "completed")


class RefundTest(DeskTest):
    """An atomic tool: its rows and its result are one transaction, in a TestCase a savepoint."""

    def test_a_refund_is_made_once_and_the_books_are_told(self) -> None:
        with (
            scripted(call("refund", number=1042, cents=500), "Refunded."),
            self.captureOnCommitCallbacks(execute=True) as told,
        ):
            run_to_end(support.start("Refund 5.00 of 1042.", owner=self.ada))
        self.assertEqual([each.cents for each in Refund.objects.all()], [500])
        self.assertEqual([each.to for each in mail.outbox], [["books@desk.example"]])
        self.assertTrue(told)

    def test_what_a_failed_refund_wrote_is_rolled_back(self) -> None:
        with scripted(call("refund", number=1042, cents=9900), "That is too much.") as model:
            run = run_to_end(support.start("Refund 99.00 of 1042.", owner=self.ada))
        self.assertEqual(self.calls(run), [("refund", "failed", "tool_failed")])
        self.assertIn("Only 5000 cents are left", str(model.shown()[-1]))
        self.assertFalse(Refund.objects.exists())

    def test_a_refund_of_less_than_nothing_is_no_refund(self) -> None:
        with scripted(call("refund", number=1042, cents=-500), "I cannot do that."):
            run = run_to_end(support.start("Refund -5.00 of 1042.", owner=self.ada))
        self.assertEqual(self.calls(run), [("refund", "failed", "invalid_arguments")])
        self.assertFalse(Refund.objects.exists())

    def test_of_two_refunds_in_parallel_the_second_finds_what_the_first_left(self) -> None:
        both = [call("refund", number=1043, cents=800), call("refund", number=1043, cents=800)]
        with scripted(both, "One of them.") as model:
            run = run_to_end(support.start("Refund 1043, twice.", owner=self.ada))
        self.assertEqual([outcome for _, outcome, _ in self.calls(run)], ["success", "failed"])
        self.assertIn("Only 100 cents are left", str(model.shown()[-1]))


class RetryTest(DeskTest):
    """Waits are rows. The clock is moved over them, so the test is over at once."""

    def test_a_carrier_that_is_away_is_asked_again_after_a_minute_and_after_two(self) -> None:
        answers = [OSError("away"), OSError("away"), {"city": "Bergen"}]
        run = support.start("Where is my parcel?", owner=self.ada)
        with (
            scripted(call("track_parcel", number=1042), "In Bergen."),
            mock.patch.object(carrier, "where_is", side_effect=answers) as where_is,
        ):
            run_to_end(run)
        self.assertEqual((run.output, where_is.call_count), ("In Bergen.", 3))
        attempts = list(ToolCall.objects.get().attempts.order_by("number"))
        waited = [after.started_at - before.started_at for before, after in pairwise(attempts)]
        self.assertEqual([each // timedelta(minutes=1) for each in waited], [1, 2])

    def test_a_carrier_that_stays_away_fails_the_call_and_not_the_run(self) -> None:
        with (
            scripted(call("track_parcel", number=1042), "I do not know."),
            mock.patch.object(carrier, "where_is", side_effect=OSError("secret-host:8080 refused")),
        ):
            run = run_to_end(support.start("Where is my parcel?", owner=self.ada))
        self.assertEqual((run.output, self.calls(run)), ("I do not know.", [("track_parcel", "failed", "error")]))
        error = ToolCall.objects.get().error
        assert error is not None
        self.assertNotIn("secret-host", error["message"])

    def test_a_mistake_of_our_own_is_not_tried_again(self) -> None:
        with (
            scripted(call("track_parcel", number=1042), "Sorry."),
            mock.patch.object(carrier, "where_is", side_effect=KeyError("parcel")) as where_is,
        ):
            run_to_end(support.start("Where is my parcel?", owner=self.ada))
        self.assertEqual(where_is.call_count, 1)

    def test_a_model_that_is_busy_is_asked_again(self) -> None:
        busy = ProviderError("rate_limited", "Slow down.", retry_after=timedelta(minutes=2))
        with scripted(busy, "Hello."):
            run = run_to_end(support.start("Hello", owner=self.ada))
        self.assertEqual((run.output, run.legs), ("Hello.", 2))

    def test_a_key_that_is_refused_fails_the_run(self) -> None:
        with scripted(ProviderError("auth", "The key is refused.")):
            run = run_to_end(support.start("Hello", owner=self.ada))
        assert run.error is not None
        self.assertEqual((run.status, run.stop_reason, run.error["code"]), ("failed", "model_error", "auth"))


class DeathTest(DeskTest):
    """A worker dies in the middle of a tool; the next `run_to_end` is the worker that takes over."""

    def test_a_question_to_the_carrier_is_asked_again(self) -> None:
        answers = [WorkerKilled, {"city": "Bergen"}]
        run = support.start("Where is my parcel?", owner=self.ada)
        with (
            scripted(call("track_parcel", number=1042), "In Bergen."),
            mock.patch.object(carrier, "where_is", side_effect=answers),
        ):
            self.assertRaises(WorkerKilled, run_to_end, run)
            self.assertEqual(run_to_end(run).output, "In Bergen.")

    def test_a_voucher_that_may_have_been_sent_is_not_sent_again(self) -> None:
        run = support.start("I want a voucher.", owner=self.ada)
        with (
            scripted(call("send_voucher", cents=500)),
            mock.patch("desk.agents.send_mail", side_effect=WorkerKilled) as send,
        ):
            self.assertRaises(WorkerKilled, run_to_end, run)
            self.assertEqual(run_to_end(run).status, "requires_action")  # a person must say what became of it
        self.assertEqual(send.call_count, 1)
        self.assertEqual(run.cancel().status, "cancelled")


class LimitTest(DeskTest):
    def test_the_last_step_is_asked_for_without_tools(self) -> None:
        with scripted(call("look_up_order", number=1042), "I ran out of steps.") as model:
            run = run_to_end(support.start("Where is order 1042?", owner=self.ada, limits={"max_steps": 2}))
        self.assertEqual((run.stop_reason, run.output), ("max_steps", "I ran out of steps."))
        self.assertEqual([request.tool_choice for request in model.requests], ["auto", "none"])

    def test_a_run_that_has_used_up_its_tokens_fails_at_the_next_step(self) -> None:
        look = call("look_up_order", number=1042)
        with scripted([look, UsageReported(input_tokens=49_000, output_tokens=1_500)]) as model:
            run = run_to_end(support.start("Where is order 1042?", owner=self.ada))
        self.assertEqual((run.status, run.stop_reason, len(model.requests)), ("failed", "token_budget", 1))

    def test_so_does_one_that_has_cost_too_much(self) -> None:
        look = call("look_up_order", number=1042)
        with scripted([look, UsageReported(input_tokens=0, output_tokens=10_000)]):  # at 2.00 a million
            run = run_to_end(support.start("Where is order 1042?", owner=self.ada, limits={"max_cost": 0.01}))
        self.assertEqual((run.stop_reason, run.cost), ("cost_budget", Decimal("0.02")))

    def test_a_deadline_comes_before_a_retry_that_is_later(self) -> None:
        busy = ProviderError("overloaded", "Not now.", retry_after=timedelta(minutes=5))
        with scripted(busy) as model:
            run = run_to_end(support.start("Hello", owner=self.ada, limits={"deadline_seconds": 60}))
        self.assertEqual((run.stop_reason, len(model.requests)), ("deadline", 1))

    def test_a_run_whose_deadline_has_passed_does_nothing_more(self) -> None:
        run = support.start("Refund 1042.", owner=self.ada)
        move_clock(timedelta(hours=2))  # the agent has one
        with scripted() as model:
            run_to_end(run)
        self.assertEqual((run.status, run.stop_reason, model.requests), ("failed", "deadline", []))


class ThreadTest(DeskTest):
    def test_a_second_question_waits_for_the_first_and_sees_its_answer(self) -> None:
        first = support.start("Where is order 1042?", owner=self.ada)
        second = support.start("And 1043?", thread=first.thread)
        self.assertEqual(second.status, "held")
        with scripted("1042 is shipped.", "1043 is paid.") as model:
            run_to_end(second)  # takes the first one to its end before it
        first.refresh_from_db()
        self.assertEqual((first.output, second.output), ("1042 is shipped.", "1043 is paid."))
        said = [message["content"][0]["text"] for message in model.shown()]
        self.assertEqual(said, ["Where is order 1042?", "1042 is shipped.", "And 1043?"])

    def test_a_cancelled_run_makes_way_for_the_next(self) -> None:
        first = support.start("Where is order 1042?", owner=self.ada)
        second = support.start("Never mind. And 1043?", thread=first.thread)
        first.cancel("no longer wanted")
        with scripted("1043 is paid."):
            run_to_end(second)
        self.assertEqual((first.status, second.output), ("cancelled", "1043 is paid."))

    def test_a_cancel_while_a_retry_waits_ends_the_call_too(self) -> None:
        def stop(parcel: str) -> None:
            run.cancel("the customer has gone")
            raise OSError("away")

        run = support.start("Where is my parcel?", owner=self.ada)
        with (
            scripted(call("track_parcel", number=1042)),
            mock.patch.object(carrier, "where_is", side_effect=stop) as it,
        ):
            run_to_end(run)
        self.assertEqual((run.status, it.call_count), ("cancelled", 1))
        self.assertEqual(self.calls(run), [("track_parcel", "cancelled", "")])

    def test_a_failed_run_goes_on_as_a_new_one(self) -> None:
        with scripted(ProviderError("quota", "The account is used up."), "Hello again."):
            failed = run_to_end(support.start("Hello", owner=self.ada))
            resumed = run_to_end(failed.resume())
        self.assertEqual((failed.status, resumed.output, resumed.parent), ("failed", "Hello again.", failed))


class VoucherTest(DeskTest):
    def test_a_voucher_carries_the_key_of_its_call(self) -> None:
        with scripted(call("send_voucher", cents=500), "Sent."):
            run = run_to_end(support.start("I want a voucher.", owner=self.ada))
        sent = ToolCall.objects.get(run_id=run.pk)
        self.assertEqual([each.body for each in mail.outbox], [f"500 cents, code {sent.idempotency_key}"])

    def test_when_the_mail_fails_it_is_not_sent_again(self) -> None:
        with (
            scripted(call("send_voucher", cents=500), "It failed."),
            mock.patch("desk.agents.send_mail", side_effect=OSError) as send,
        ):
            run = run_to_end(support.start("I want a voucher.", owner=self.ada))
        self.assertEqual((send.call_count, self.calls(run)), (1, [("send_voucher", "failed", "error")]))


class NoteTest(DeskTest):
    def test_an_async_tool_sees_the_rows_of_the_test(self) -> None:
        run = support.start("Tell your boss.", owner=self.ada)
        ticket = Ticket.objects.create(customer=self.ada, subject="Boss", thread=run.thread)
        with scripted(call("leave_note", topic="boss", text="Call Ada."), "Done."):
            run_to_end(run)
        self.assertEqual([(each.ticket, each.text) for each in Note.objects.all()], [(ticket, "Call Ada.")])
