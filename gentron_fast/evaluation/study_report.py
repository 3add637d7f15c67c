"""What the votes of a study say: as text, JSON and a picture, and the raw votes as CSV."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gentron_fast.evaluation.preference import (
    bootstrap_intervals,
    krippendorff_alpha,
    sign_test,
)
from gentron_fast.evaluation.study import ShownPair, Study
from gentron_fast.evaluation.votes import QUESTIONS, Vote
from gentron_fast.files import read_json, whole_file, write_json
from gentron_fast.intervals import wilson_interval

FILES = ("report.txt", "report.json", "votes.csv", "report.png")
OUTCOMES = ("win", "draw", "lose")  # of A against B
WORDS = {"quality": "looks better", "text": "fits the text better"}
COLOURS = ("#6f9fd8", "#d2d2d6", "#e09a63")
PAPER = {
    "study": "GenTron against SDXL, 100 PartiPrompts (arXiv 2312.04557)",
    "quality": (0.511, 0.198, 0.291),
    "text": (0.423, 0.429, 0.148),
}
Ballot = tuple[ShownPair, Vote]


def write_report(study: Study, votes: Sequence[Vote], folder: Path) -> str:
    """Write report.json, report.txt, report.png and votes.csv into a folder; the text.

    ValueError where there are no votes. Without matplotlib there is no picture.
    """
    pairs = {pair.id: pair for pair in study.pairs}
    ballots = [(pairs[vote.pair], vote) for vote in votes if vote.pair in pairs]
    if not ballots:
        raise ValueError(f"{study.folder} has no votes yet")
    values = summarise(study, ballots)
    text = report_text(values)
    *written, picture = FILES
    with whole_file(folder / written[0]) as partial:
        partial.write_text(text)
    write_json(folder / written[1], values)
    write_votes(folder / written[2], study, ballots)
    try:
        draw_report(folder / picture, values)
        written.append(picture)
    except ImportError:
        text += "no picture: matplotlib draws it (pip install matplotlib)\n"
    return f"{text}wrote        {', '.join(written)} in {folder}\n"


def summarise(study: Study, ballots: Sequence[Ballot]) -> dict:
    """Everything that the report says, as shares from 0 to 1."""
    groups = {}
    for kind in ("category", "challenge"):
        names = sorted({getattr(pair, kind) for pair, _ in ballots} - {None})
        groups[kind] = {
            name: outcomes([ballot for ballot in ballots if getattr(ballot[0], kind) == name])
            for name in names
        }
    return {
        "a": study.names[0],
        "b": study.names[1],
        "pairs": len(study.pairs),
        "pairs_judged": len({pair.id for pair, _ in ballots}),
        "raters": {
            rater: sum(vote.rater == rater for _, vote in ballots)
            for rater in sorted({vote.rater for _, vote in ballots})
        },
        **outcomes(ballots),
        "agreement": {question: agreement(ballots, question) for question in QUESTIONS},
        "by_category": groups["category"],
        "by_challenge": groups["challenge"],
        "paper": PAPER,
    }


def outcomes(ballots: Sequence[Ballot]) -> dict:
    """Of some votes, for each question: the shares with both intervals, and the sign test.

    A prompt is won where more of its votes, over all its pairs and raters, are for A than for B.
    """
    prompts = {
        pair.prompt: index for index, pair in enumerate({p.prompt: p for p, _ in ballots}.values())
    }
    result = {"votes": len(ballots), "prompts": len(prompts)}
    for question in QUESTIONS:
        counts = np.zeros((len(prompts), len(OUTCOMES)), int)
        for pair, vote in ballots:
            counts[prompts[pair.prompt], pair.winner(getattr(vote, question))] += 1
        totals, total = counts.sum(0).tolist(), len(ballots)
        bootstrap = bootstrap_intervals(counts)
        lead = np.sign(counts[:, 0] - counts[:, 2])
        wins, losses = int((lead > 0).sum()), int((lead < 0).sum())
        result[question] = {
            name: {
                "votes": totals[index],
                "share": totals[index] / total,
                "wilson": wilson_interval(totals[index], total),
                "bootstrap": bootstrap[index],
            }
            for index, name in enumerate(OUTCOMES)
        }
        result[question]["sign_test"] = {
            "prompts_won": wins,
            "prompts_lost": losses,
            "prompts_even": len(prompts) - wins - losses,
            "p": sign_test(wins, losses),
        }
    return result


def agreement(ballots: Sequence[Ballot], question: str) -> dict:
    """Krippendorff's α between raters over pairs; None where no pair has two votes."""
    units = {}
    for pair, vote in ballots:
        units.setdefault(pair.id, []).append(pair.winner(getattr(vote, question)))
    return {
        "pairs": sum(len(unit) > 1 for unit in units.values()),
        "alpha_ordinal": krippendorff_alpha(list(units.values())),
        "alpha_nominal": krippendorff_alpha(list(units.values()), ordinal=False),
    }


def report_text(values: dict) -> str:
    """The report in lines of at most 100 characters, but for long names."""
    raters = ", ".join(f"{name} {count}" for name, count in values["raters"].items())
    lines = [
        f"A            {values['a']}",
        f"B            {values['b']}",
        f"votes        {values['votes']}, on {values['pairs_judged']} of {values['pairs']} pairs,"
        f" {values['prompts']} prompts",
        f"raters       {raters}",
        "",
        "A against B, in % of the votes, with 95 % intervals",
    ]
    for question in QUESTIONS:
        lines += ["", f"{WORDS[question]:<22}" + "".join(f"{name:>20}" for name in OUTCOMES)]
        results = [values[question][name] for name in OUTCOMES]
        lines.append(_row("  votes", [f"{_percent(result['share'])}" for result in results]))
        for kind, words in (("wilson", "Wilson"), ("bootstrap", "bootstrap, prompts")):
            ends = [" to ".join(map(_percent, result[kind])) for result in results]
            lines.append(_row(f"  {words}", ends))
        lines.append(_row("  the paper", map(_percent, values["paper"][question])))
        test = values[question]["sign_test"]
        lines.append(
            f"  {'sign test':<22}{test['prompts_won']} prompts won, {test['prompts_lost']} lost,"
            f" {test['prompts_even']} even: p = {test['p']:.4f}"
        )
        alpha = values["agreement"][question]
        lines.append(
            f"  Krippendorff's α      {_alpha(alpha['alpha_ordinal'])} ordinal,"
            f" {_alpha(alpha['alpha_nominal'])} nominal, {alpha['pairs']} pairs of several votes"
        )
    for kind in ("category", "challenge"):
        if not values[f"by_{kind}"]:
            continue
        lines += [
            "",
            f"by {kind:<24}votes   looks better: win draw lose   fits the text: win draw lose",
        ]
        for name, group in values[f"by_{kind}"].items():
            shares = [
                " ".join(
                    f"{_percent(group[question][outcome]['share']):>5}" for outcome in OUTCOMES
                )
                for question in QUESTIONS
            ]
            lines.append(f"  {name:<25}{group['votes']:>5}   {shares[0]:>28}   {shares[1]:>29}")
    lines += [
        "",
        f"The paper: {values['paper']['study']}.",
        "Wilson's intervals take votes as independent; with several raters, or several pairs of a",
        "prompt, the bootstrap over prompts and the sign test over prompts are the ones to quote.",
    ]
    return "\n".join(lines) + "\n"


def _row(title: str, cells) -> str:
    return f"{title:<22}" + "".join(f"{cell:>20}" for cell in cells)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _alpha(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}"


def write_votes(path: Path, study: Study, ballots: Sequence[Ballot]) -> None:
    """The votes as they were given, and what each says of A, a line each, oldest first."""
    with whole_file(path) as partial, partial.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(
            ["voted_at", "rater", "name", "prompt", "category", "challenge", "left", "right"]
            + [f"{question}_{kind}" for question in QUESTIONS for kind in ("seen", "a")]
        )
        for pair, vote in ballots:
            sides = study.names[pair.left], study.names[1 - pair.left]
            said = []
            for question in QUESTIONS:
                seen = getattr(vote, question)
                said += [seen, OUTCOMES[pair.winner(seen)]]
            about = [pair.name, pair.prompt, pair.category, pair.challenge]
            rows.writerow([vote.voted_at, vote.rater, *about, *sides, *said])


def is_report(folder: Path) -> bool:
    """Whether a folder holds an earlier report."""
    try:
        return read_json(folder / "report.json").keys() >= {"pairs_judged", *QUESTIONS}
    except (OSError, ValueError):
        return False


def draw_report(path: Path, values: dict) -> None:
    """A picture of the shares: all votes beside the paper's study, then category and challenge.

    The bars of all votes carry the bootstrap's intervals where win ends and lose begins.
    """
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):  # a $ in a name is a dollar
        _draw(path, values)


def _draw(path: Path, values: dict) -> None:
    from matplotlib.figure import Figure

    rows, places = [("all votes", values), ("the paper", None)], [0.0, 1.0]
    for groups in (values["by_category"], values["by_challenge"]):
        rows += groups.items()
        places += [places[-1] + 1.6 + index for index in range(len(groups))]
    figure = Figure(figsize=(10, 1.5 + 0.28 * places[-1]), layout="constrained")
    axes = figure.subplots(1, len(QUESTIONS), sharey=True)
    for question, axis in zip(QUESTIONS, axes, strict=True):
        start = np.zeros(len(rows))
        for index, outcome in enumerate(OUTCOMES):
            paper = values["paper"][question][index]
            shares = [group[question][outcome]["share"] if group else paper for _, group in rows]
            shares = 100 * np.array(shares)
            bars = axis.barh(places, shares, left=start, color=COLOURS[index], label=outcome)
            texts = [f"{share:.0f}" if share >= 6 else "" for share in shares]
            axis.bar_label(bars, texts, label_type="center", fontsize=8)
            start += shares
        for ends in (
            [100 * end for end in values[question]["win"]["bootstrap"]],
            [100 * (1 - end) for end in values[question]["lose"]["bootstrap"]],
        ):
            axis.plot(ends, [0.3, 0.3], color="black", marker="|", linewidth=1)
        axis.set(title=WORDS[question], xlim=(0, 100), xlabel="% of votes")
        axis.set_yticks(
            places, [f"{name} ({group['votes']})" if group else name for name, group in rows]
        )
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.margins(y=0.01)
    axes[0].invert_yaxis()
    figure.suptitle(f"{values['a']} (A) against {values['b']} (B)", fontsize=11)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=120)
