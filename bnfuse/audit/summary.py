"""The audit in a paragraph, for somebody who is no engineer: what was asked, what was found, what was not asked."""

from __future__ import annotations

from .context import Context
from .findings import DIAGNOSTIC, LEAK, NO_LEAK, NOT_RUN, VOID, Finding

_BUDGETS = {
    "quick": "This was the quick budget, a first look: the standard one tries longer and on more images. ",
    "standard": "",
    "full": "",
}


def summarise(findings: list[Finding], context: Context) -> dict[str, str]:
    """{"asked", "found", "not_asked"}: some plain sentences each."""
    return {"asked": _asked(context), "found": _found(findings), "not_asked": _not_asked(context)}


def verdict_lines(findings: list[Finding]) -> str:
    """A line for each measure, for a terminal: its title, its verdict and, unless it is void, the result."""
    width = max(len(f.title) for f in findings)
    lines = []
    for finding in findings:
        said = "" if finding.verdict == VOID else finding.sentence
        lines.append(f"  {finding.title:{width}s}  {finding.verdict:12s}  {said}".rstrip())
    return "\n".join(lines)


def _asked(context: Context) -> str:
    return (
        f"{len(context.synthetic):,} synthetic images are to be published in the place of {len(context.private):,} private "
        f"ones ({context.private.name}). Does what is published give away what a private image shows, or whose image is among "
        "them? It was asked by trying: each test below copies what an attacker would do."
    )


def _found(findings: list[Finding]) -> str:
    by = {verdict: [f for f in findings if f.verdict == verdict] for verdict in (LEAK, NO_LEAK, DIAGNOSTIC, VOID, NOT_RUN)}
    sentences = []
    if by[LEAK]:
        sentences.append(f"{_count(by[LEAK])} found a leak ({_titles(by[LEAK])}).")
        sentences += [_ended(f.sentence) for f in by[LEAK]]
    if by[NO_LEAK]:
        sentences.append(f"{_count(by[NO_LEAK])} saw no leak ({_titles(by[NO_LEAK])}).")
    if by[DIAGNOSTIC]:
        sentences.append(
            f"{_count(by[DIAGNOSTIC])} only {_s(by[DIAGNOSTIC], 'describe')} the images ({_titles(by[DIAGNOSTIC])})."
        )
    if by[VOID]:
        sentences.append(
            f"{_count(by[VOID])} {'is' if len(by[VOID]) == 1 else 'are'} void, and {_s(by[VOID], 'say')} nothing either way, "
            f"since the attack failed even where it had to succeed ({_titles(by[VOID])})."
        )
    if by[NOT_RUN]:
        sentences.append(
            f"{_count(by[NOT_RUN])} {'was' if len(by[NOT_RUN]) == 1 else 'were'} not run ({_titles(by[NOT_RUN])})."
        )
    if not by[LEAK] and not by[NO_LEAK]:
        sentences.append("So it is not known whether anything leaks.")
    return " ".join(sentences)


def _not_asked(context: Context) -> str:
    return (
        f"{_BUDGETS[context.budget]}An audit can show that something leaks; it cannot show that nothing does. Other attacks "
        "than these, and attackers with more time or more knowledge, were not tried, and no guarantee such as differential "
        "privacy follows. The network that the synthetic images were made with was not attacked: it is not for publication."
    )


def _count(findings: list[Finding]) -> str:
    words = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten")
    count = words[len(findings)] if len(findings) < len(words) else str(len(findings))
    return f"{count} measure{'s' if len(findings) != 1 else ''}"


def _s(findings: list[Finding], verb: str) -> str:
    return verb + "s" if len(findings) == 1 else verb


def _titles(findings: list[Finding]) -> str:
    return ", ".join(f.title for f in findings)


def _ended(sentence: str) -> str:
    return sentence if sentence.endswith((".", "!", "?")) else sentence + "."
