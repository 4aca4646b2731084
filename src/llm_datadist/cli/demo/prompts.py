"""The five prompts: from shorter than a block to well beyond a thousand tokens."""

from __future__ import annotations

from dataclasses import dataclass

_WINDS = ("north", "north-west", "west", "south-west", "south", "east", "north-east")
_DEEDS = (
    "the keeper painted the gallery rail",
    "a storm petrel sat on the lantern room until noon",
    "the supply boat brought flour, oil and three letters",
    "fog hid the harbour and the bell rang all night",
    "the clockwork was cleaned and wound twice",
    "a schooner asked for water and left some apples",
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a user asks. Without `is_chat` the text is continued as it stands."""

    text: str
    is_chat: bool = True


def _logbook(num_days: int) -> str:
    """A lighthouse's log: text of any length without a file to ship."""
    return "\n".join(
        f"Day {day}: wind from the {_WINDS[day * 3 % len(_WINDS)]}, {day * 7 % 11} ships passed; "
        f"{_DEEDS[day * 5 % len(_DEEDS)]}."
        for day in range(1, num_days + 1)
    )


PROMPTS = (
    Prompt("The capital of France is", is_chat=False),
    Prompt("What does a lighthouse do? Answer in two sentences."),
    Prompt(
        "A lighthouse keeper rises before dusk, climbs the spiral stairs with a can of oil, trims "
        "the wick, polishes the lens with a soft cloth and lights the lamp. Through the night the "
        "clockwork must be wound every four hours, and in fog the bell is rung by hand. In the "
        "morning the lamp is put out, the curtains are drawn so that the sun does not crack the "
        "lens, and the log is written. Then the keeper sleeps, if the sea allows it.\n\n"
        "Write a short poem about this keeper."
    ),
    Prompt(
        f"This is the log of a lighthouse.\n\n{_logbook(20)}\n\nWhat did the supply boat bring?"
    ),
    Prompt(
        f"This is the log of a lighthouse.\n\n{_logbook(60)}\n\n"
        "Tell the story of these sixty days in a few sentences."
    ),
)
