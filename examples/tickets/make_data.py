"""Make support tickets and their routing lines: train.jsonl, dev.jsonl and test.jsonl, the same for
a seed.

    python examples/tickets/make_data.py [--seed 7] [--out examples/tickets/data]

A ticket is a few sentences; its routing line is `team=billing | priority=high | product=Ledgerly |
ref=INV-20418`. What makes it more than keyword spotting: another product is named in passing,
numbers that are no reference appear, urgency is stated by its effect and sometimes denied, and dev
and test use phrasings that train never shows (the last quarter of every list below). The texts are
made from the lists in this file; they and the data are CC0.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

SIZES = {"train": 900, "dev": 80, "test": 160}

SOFTWARE = ("Nimbus Drive", "Ledgerly", "PingDesk", "Orbit Mail", "FormFlow", "Tasklane")
HARDWARE = ("Halo Router", "Lumen Cam", "Tempo Dock", "Pico Speaker")

# {p}: the product. One tuple per kind of problem; the team is what they have in common.
ISSUES: dict[str, tuple[tuple[str, ...], ...]] = {
    "billing": (
        (
            "I was charged twice for {p}",
            "my card shows two payments for {p} this month",
            "there are two identical debits for {p} on my statement",
            "{p} took the money from my account a second time",
        ),
        (
            "the refund for {p} has not arrived",
            "I am still waiting for my money back for {p}",
            "you promised to pay back my {p} purchase and nothing came",
            "no sign of the reimbursement you agreed for {p}",
        ),
        (
            "the VAT number on the {p} invoice is wrong",
            "our company address is missing on the bill for {p}",
            "please correct the tax line on my {p} invoice",
            "accounting rejects your {p} bill because our name is misspelled on it",
        ),
        (
            "{p} renewed although I cancelled it",
            "I was billed for another year of {p} after cancelling",
            "my cancelled {p} subscription was charged again",
            "I ended {p} in spring and still paid for it this week",
        ),
        (
            "the discount code was not applied to {p}",
            "I paid full price for {p} despite the voucher",
            "the coupon for {p} made no difference at checkout",
            "{p} cost me the regular price though I entered the promotion",
        ),
    ),
    "technical": (
        (
            "{p} crashes as soon as I open it",
            "{p} closes itself after a few seconds",
            "{p} freezes on the start screen",
            "when I start {p} it simply quits",
        ),
        (
            "{p} shows error 503 all day",
            "I keep getting error 418 in {p}",
            "{p} answers every click with error 500",
            "all I see in {p} is a page that says error 502",
        ),
        (
            "{p} has become terribly slow",
            "everything in {p} takes minutes to load",
            "{p} needs ages to respond since the update to version 4.2",
            "since version 5.1 {p} crawls",
        ),
        (
            "the latest firmware broke {p}",
            "{p} stopped working after the update",
            "{p} no longer connects to the network",
            "{p} drops its connection every few minutes",
        ),
        (
            "some of my data in {p} has disappeared",
            "the entries I saved in {p} are gone",
            "{p} lost what I entered yesterday",
            "half of my records in {p} have vanished",
        ),
    ),
    "account": (
        (
            "I cannot log in to {p}",
            "{p} does not accept my password any more",
            "the sign-in page of {p} rejects me",
            "{p} tells me my credentials are unknown",
        ),
        (
            "I lost the phone with the codes for {p}",
            "my second factor for {p} is gone",
            "I have no access to the authenticator for {p}",
            "my new handset does not produce valid codes for {p}",
        ),
        (
            "please change the e-mail address of my {p} profile",
            "I need a different login address for {p}",
            "my {p} login still uses an address that I no longer own",
            "kindly move my {p} login to another mailbox",
        ),
        (
            "my {p} profile has been locked",
            "{p} says that my user is suspended",
            "I am locked out of {p} after too many attempts",
            "{p} has blocked my user without giving a reason",
        ),
        (
            "please delete my {p} login and all personal data",
            "I want my {p} profile removed",
            "erase everything you store about me in {p}",
            "I ask you to close my {p} profile under data protection law",
        ),
    ),
    "shipping": (
        (
            "my {p} has not been delivered",
            "the parcel with my {p} is late",
            "I am still waiting for the {p} that I ordered",
            "the courier never brought the {p}",
        ),
        (
            "the {p} arrived broken",
            "my {p} came with a cracked case",
            "the box with the {p} was crushed",
            "I unpacked a {p} with a dent and a loose part",
        ),
        (
            "you sent me the wrong colour of the {p}",
            "the {p} in the parcel is not the model that I ordered",
            "instead of one {p} I received two",
            "what came in the mail is a different {p} from the one I picked",
        ),
        (
            "tracking for my {p} has not moved",
            "the tracking page for the {p} is stuck",
            "I have no tracking number for the {p}",
            "for days the status of my {p} parcel has stayed the same",
        ),
    ),
    "sales": (
        (
            "we would like a quote for {p} for our team",
            "please send us an offer for {p}",
            "what would {p} cost for a whole department",
            "could you price {p} for a group of our size",
        ),
        (
            "can our trial of {p} be extended",
            "we need two more weeks to test {p}",
            "our evaluation of {p} ends too early",
            "we have not finished trying out {p} before the free period ends",
        ),
        (
            "is there an education discount for {p}",
            "do schools get {p} cheaper",
            "does a charity pay less for {p}",
            "which reductions do you grant non-profits that buy {p}",
        ),
        (
            "could someone show us {p} in a demo",
            "we would like to see {p} presented before we buy",
            "please arrange a walkthrough of {p} for our managers",
            "who can give our board a tour of {p}",
        ),
    ),
}

IMPACT: dict[str, tuple[str, ...]] = {
    "urgent": (
        "Nobody in the company can work.",
        "Our customers are affected right now.",
        "We lose sales every hour.",
        "All of our sites are down because of this.",
        "A stranger seems to be using my data.",
        "Production has stopped.",
        "The whole office stands still.",
        "Clients are seeing this at this very moment.",
    ),
    "high": (
        "I have a presentation tomorrow morning.",
        "Our payroll runs tonight.",
        "The audit starts on Monday.",
        "This is the third time that I write.",
        "My deadline is today.",
        "Two colleagues are blocked.",
        "I must have it solved before tomorrow noon.",
        "We go live at the end of this week.",
    ),
    "normal": (
        "",
        "",
        "Please look into it.",
        "I would be glad of an answer this week.",
        "Thanks for checking.",
        "",
        "Could you take a look?",
        "I look forward to your reply.",
    ),
    "low": (
        "There is no rush.",
        "Whenever you have time.",
        "It can easily wait until next month.",
        "My colleague calls it urgent, but it really is not.",
        "I am only curious.",
        "This is not an emergency at all.",
        "Take all the time you need.",
        "My boss marked this as critical, ignore that, it can wait.",
    ),
}

OPENINGS = (
    "Hello,",
    "Hi there,",
    "Good morning,",
    "Dear team,",
    "",
    "",
    "To whom it may concern,",
    "Hey support,",
)
DISTRACTORS = (
    "{o} works fine, by the way.",
    "I also use {o} and have no complaints about it.",
    "We have had {o} for years.",
    "You can reach me at 555-0142.",
    "I am on version 3.8.",
    "",
    "With {o} this never happened.",
    "My extension is 4471.",
)
REFERENCES = {
    "billing": (
        "INV-",
        ("The invoice is {r}.", "See invoice {r}.", "It concerns {r}.", "On the bill it says {r}."),
    ),
    "shipping": (
        "ORD-",
        ("The order number is {r}.", "My order is {r}.", "Order {r}.", "You confirmed it as {r}."),
    ),
    "technical": (
        "LOG-",
        (
            "The log is {r}.",
            "I uploaded {r}.",
            "Diagnostics: {r}.",
            "Your tool saved a report as {r}.",
        ),
    ),
    "account": (
        "USR-",
        ("My user is {r}.", "The profile is {r}.", "I am {r}.", "You know me as {r}."),
    ),
    "sales": (
        "QUO-",
        (
            "An earlier offer was {r}.",
            "We spoke about {r}.",
            "See quote {r}.",
            "It follows on from {r}.",
        ),
    ),
}
CLOSINGS = (
    "",
    "",
    "Regards, Kim",
    "Thank you!",
    "Best, A. Moreno",
    "Cheers",
    "Yours, J. Petit",
    "Many thanks, Sasha",
)


class Phrases:
    """Draws from the lists: the first three quarters for training, the last quarter otherwise."""

    def __init__(self, rng: random.Random, *, held_out: bool) -> None:
        self.rng, self.held_out = rng, held_out

    def pick(self, phrases: tuple[str, ...]) -> str:
        cut = len(phrases) - max(1, len(phrases) // 4)
        return self.rng.choice(phrases[cut:] if self.held_out else phrases[:cut])


def ticket(rng: random.Random, *, held_out: bool) -> dict[str, str]:
    """One ticket and its routing line."""
    phrases = Phrases(rng, held_out=held_out)
    team = rng.choice(tuple(ISSUES))
    priority = rng.choice(tuple(IMPACT))
    products = HARDWARE if team == "shipping" else SOFTWARE + HARDWARE * (team == "technical")
    product = rng.choice(products)
    other = rng.choice([name for name in SOFTWARE + HARDWARE if name != product])
    prefix, sentences = REFERENCES[team]
    reference = f"{prefix}{rng.randint(10000, 99999)}" if rng.random() < 0.6 else "none"
    issue = phrases.pick(rng.choice(ISSUES[team])).format(p=product)
    body = [
        issue[0].upper() + issue[1:] + ".",
        phrases.pick(IMPACT[priority]),
        phrases.pick(DISTRACTORS).format(o=other),
        "" if reference == "none" else phrases.pick(sentences).format(r=reference),
    ]
    if rng.random() < 0.5:
        rng.shuffle(body)
    parts = [phrases.pick(OPENINGS), *body, phrases.pick(CLOSINGS)]
    route = f"team={team} | priority={priority} | product={product} | ref={reference}"
    return {"ticket": " ".join(part for part in parts if part), "route": route}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the tickets data set.")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for split, size in SIZES.items():
        rng = random.Random(f"{arguments.seed}/{split}")
        rows = [ticket(rng, held_out=split != "train") for _ in range(size)]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (arguments.out / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
