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
import re
from pathlib import Path

SIZES = {"train": 1000, "dev": 80, "test": 160}

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

# [a|b|c]: one of them. What a ticket says about its effect, which is all that its priority is.
IMPACT: dict[str, tuple[str, ...]] = {
    "urgent": (
        "[Nobody|No one|Not a single person] in [the company|our office|the warehouse|our clinic] "
        "can [work|do anything|take orders].",
        "[Our customers|All our clients|Thousands of users] [are affected|see this|are cut off] "
        "[right now|at this moment|as I write].",
        "We [lose|are losing] [sales|money|orders] [every hour|every minute|by the minute].",
        "[All of our sites|All shops|All branches] [are|have been] down [because of this|all day].",
        "[A stranger|Somebody else|An intruder] [seems to be|is] using [my data|our files].",
        "[Production|The assembly line|Our web shop] has [stopped|come to a halt|gone dark].",
        "The whole [office|company|warehouse] [stands still|has come to a halt] right now.",
        "[Clients|Customers|Users] everywhere are [cut off|affected] [this very minute|right now].",
    ),
    "high": (
        "I [need|must have] it [before|by] [tomorrow morning|tonight|noon tomorrow|Friday].",
        "[Our payroll|The audit|Our launch|The board meeting] [is|starts] "
        "[tomorrow|on Monday|tonight].",
        "This is [the second|the third|already the fourth] time that I [write|ask|report it].",
        "[My|Our] deadline is [today|tomorrow|on Thursday].",
        "[Two|Three|Some] [colleagues|people in my team|of us] are [blocked|waiting for this].",
        "I have [a presentation|an exam|a client meeting] [tomorrow morning|tonight|on Friday].",
        "We go live [tomorrow|on Monday|on Friday] and [need|must have] it by then.",
        "I [wrote|asked] [twice|three times] already, and my deadline is [tomorrow|on Friday].",
    ),
    "normal": (
        "",
        "Please [look into it|have a look|check this].",
        "I would be [glad|happy] to [hear from you|have an answer] [soon|this week].",
        "Thanks for [checking|your help|looking at it].",
        "[Can|Could] you [help|look at this|tell me what to do]?",
        "Let me know what [you find|to do|you need from me].",
        "I look forward to [your reply|hearing from you|your answer].",
        "Could you [check|have a look] and let me know?",
    ),
    "low": (
        "There is [no rush|no hurry|no need to hurry].",
        "Answer [whenever you have time|when you find a moment|once you get round to it].",
        "It can [easily wait|wait] [until next month|a few weeks|for a while].",
        "[My boss|A colleague|My assistant] [calls it|marked it as] [urgent|critical], but "
        "[it really is not|there is no hurry|it can wait].",
        "I am [only|just] [curious|wondering|asking].",
        "This is [not an emergency|not urgent|nothing urgent] [at all|really|by any means].",
        "Take [your time|all the time you need], it is [not urgent|no emergency].",
        "[My manager|Someone here] marked this as [critical|urgent], ignore that, "
        "[it can wait|there is no rush].",
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
        phrase = self.rng.choice(phrases[cut:] if self.held_out else phrases[:cut])
        return re.sub(r"\[(.*?)\]", lambda match: self.rng.choice(match[1].split("|")), phrase)


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
