"""What starts runs: views (ATOMIC_REQUESTS is on), an async view, a management command. Plain TestCases."""

import json
from io import StringIO
from typing import Any

from asgiref.sync import sync_to_async
from django.contrib.auth.models import User
from django.core.management import call_command
from django.db import transaction
from django.test import TestCase

from desk.agents import support
from desk.models import Order, Ticket
from runs import Run
from runs.pytest_longhaul import assert_invariants, call, run_to_end, scripted


class TicketTest(TestCase):
    ada: User

    @classmethod
    def setUpTestData(cls) -> None:
        cls.ada = User.objects.create_user("ada", "ada@example.com")
        Order.objects.create(number=1042, customer=cls.ada, state="shipped", cents=5000)

    def setUp(self) -> None:
        self.client.force_login(self.ada)

    def tearDown(self) -> None:
        assert_invariants()

    def post(self, path: str, **body: Any) -> Any:
        return self.client.post(path, json.dumps(body), content_type="application/json")

    def open(self, **more: Any) -> dict[str, Any]:
        answer = self.post("/tickets/", subject="Parcel", text="Where is order 1042?", **more)
        self.assertEqual(answer.status_code, 202)
        told: dict[str, Any] = answer.json()
        return told

    def test_a_ticket_is_opened_and_answered(self) -> None:
        told = self.open()
        self.assertEqual(told["status"], "queued")  # the request does not wait for the model
        with scripted(call("look_up_order", number=1042), "It is shipped."):
            run_to_end(Run.objects.get(pk=told["run"]))
        shown = self.client.get(f"/tickets/{told['ticket']}/").json()
        self.assertEqual([each["text"] for each in shown["messages"]], ["Where is order 1042?", "It is shipped."])
        self.assertEqual([each["status"] for each in shown["runs"]], ["completed"])

    def test_the_same_key_is_the_same_ticket(self) -> None:
        self.assertEqual(self.open(key="a"), self.open(key="a"))
        self.assertEqual((Run.objects.count(), Ticket.objects.count()), (1, 1))

    def test_nothing_to_say_is_a_bad_request_and_leaves_nothing(self) -> None:
        self.assertEqual(self.post("/tickets/", subject="Parcel", text=" ").status_code, 400)
        self.assertEqual((Run.objects.count(), Ticket.objects.count()), (0, 0))

    def test_a_request_that_fails_has_started_nothing(self) -> None:
        """The run is part of the request's transaction, in a TestCase a savepoint of the test's."""
        with self.assertRaises(ZeroDivisionError), transaction.atomic():
            support.start("Where is order 1042?", owner=self.ada)
            raise ZeroDivisionError
        self.assertFalse(Run.objects.exists())

    def test_the_message_is_sent_to_the_workers_when_the_request_commits(self) -> None:
        with self.captureOnCommitCallbacks() as callbacks:
            self.open()
        self.assertEqual(len(callbacks), 1)  # one run, one message: not executed, for nobody would answer

    def test_more_words_wait_for_the_answer_before_them(self) -> None:
        first = self.open()
        second = self.post(f"/tickets/{first['ticket']}/messages/", text="And when will it be here?").json()
        self.assertEqual(second["status"], "held")
        with scripted("It is shipped.", "Tomorrow."):
            run_to_end(Run.objects.get(pk=second["run"]))
        texts = [each["text"] for each in self.client.get(f"/tickets/{first['ticket']}/").json()["messages"]]
        self.assertEqual(texts, ["Where is order 1042?", "It is shipped.", "And when will it be here?", "Tomorrow."])

    def test_an_answer_is_stopped(self) -> None:
        told = self.open()
        stopped = self.post(f"/tickets/{told['ticket']}/stop/").json()
        self.assertEqual((stopped["run"], stopped["status"]), (told["run"], "cancelled"))
        with scripted() as model:
            run_to_end(Run.objects.get(pk=told["run"]))  # it has ended: nothing happens
        self.assertEqual(model.requests, [])
        self.assertEqual(self.post(f"/tickets/{told['ticket']}/stop/").status_code, 404)

    def test_nobody_sees_the_ticket_of_somebody_else(self) -> None:
        told = self.open()
        self.client.force_login(User.objects.create_user("eve"))
        self.assertEqual(self.client.get(f"/tickets/{told['ticket']}/").status_code, 404)


class CommandTest(TestCase):
    def answer_tickets(self) -> list[list[str]]:
        out = StringIO()
        call_command("answer_tickets", stdout=out)
        return [line.split() for line in out.getvalue().splitlines()]

    def test_it_starts_a_run_where_the_customer_waits(self) -> None:
        ada = User.objects.create_user("ada")
        first = support.start("Hello?", owner=ada)
        ticket = Ticket.objects.create(customer=ada, subject="Hello", thread=first.thread)
        self.assertEqual(self.answer_tickets(), [])  # it is being answered
        first.cancel()
        ((answered, run),) = self.answer_tickets()
        self.assertEqual(answered, str(ticket.pk))
        with scripted("Hello."):
            run_to_end(Run.objects.get(pk=run))
        self.assertEqual(self.answer_tickets(), [])  # it was answered
        assert_invariants()

    def test_the_migrations_are_those_of_the_models_and_the_settings_are_sound(self) -> None:
        call_command("makemigrations", "--check", "--dry-run", stdout=StringIO())
        call_command("check", "--fail-level", "WARNING", stdout=StringIO(), stderr=StringIO())


class AskTest(TestCase):
    """An async view. A TestCase's async test runs Django's sync code, `run_to_end` too, on the test's connection."""

    async def test_a_question_is_asked_and_answered(self) -> None:
        answer = await self.async_client.post(
            "/ask/", json.dumps({"text": "Do you ship to Norway?"}), content_type="application/json"
        )
        self.assertEqual(answer.status_code, 202)
        run = await Run.objects.aget(pk=answer.json()["run"])
        with scripted("We do."):
            await sync_to_async(run_to_end)(run)
        self.assertEqual(run.output, "We do.")
        self.assertEqual([event.type async for event in run.aevents(follow=False)][-1], "run.completed")
