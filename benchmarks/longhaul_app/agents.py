"""An agent whose tool costs nothing, so that what is measured is Longhaul."""

from runs import Agent
from tools import tool


@tool(idempotent=True)
def take(number: int) -> int:
    """Take a number.

    Args:
        number: the number
    """
    return number


bench = Agent(
    name="bench",
    model="openai:bench",
    instructions="Call the tool until you have enough.",
    tools=[take],
    max_steps=1000,
    context={"last_messages": 200},  # all of it, as the others send
)
