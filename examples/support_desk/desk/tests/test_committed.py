"""Where a test commits: `on_commit` runs for real, rows are seen by other connections.

Starting a run sends a message here. With no broker to be reached that is a warning in the log, as it is in production:
the run is a row, and whoever looks for what is due finds it.
"""

from django.contrib.auth.models import User
from django.core import mail
from django.test import TransactionTestCase

from desk.agents import support
from desk.models import Note, Order, Refund, Ticket
from runs.pytest_longhaul import assert_invariants, call, run_to_end, scripted
from threads.models import Thread


class CommittedTest(TransactionTestCase):
    def setUp(self) -> None:
        self.ada = User.objects.create_user("ada", "ada@example.com")
        Order.objects.create(number=1042, customer=self.ada, cents=5000)

    def tearDown(self) -> None:
        assert_invariants()

    def test_the_books_are_told_when_the_refund_is_committed(self) -> None:
        with scripted(call("refund", number=1042, cents=500), "Refunded."):
            run = run_to_end(support.start("Refund 5.00 of 1042.", owner=self.ada))
        self.assertEqual((run.output, Refund.objects.count(), len(mail.outbox)), ("Refunded.", 1, 1))

    def test_the_books_are_not_told_of_a_refund_that_failed(self) -> None:
        with scripted(call("refund", number=1042, cents=9900), "Too much."):
            run_to_end(support.start("Refund 99.00 of 1042.", owner=self.ada))
        self.assertEqual((Refund.objects.count(), mail.outbox), (0, []))

    def test_a_note_is_replaced(self) -> None:
        thread = Thread.objects.create(owner=self.ada, agent="support")
        Ticket.objects.create(customer=self.ada, subject="Boss", thread=thread)
        notes = [call("leave_note", topic="boss", text=text) for text in ("Call Ada.", "Call Ada at once.")]
        with scripted(*notes, "Done."):
            run_to_end(support.start("Tell your boss.", thread=thread))
        self.assertEqual([each.text for each in Note.objects.all()], ["Call Ada at once."])
