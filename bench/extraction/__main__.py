"""`python -m bench.extraction [--json]`: precision and recall of the rules on the labelled turns and pairs."""

from __future__ import annotations

import argparse
import json
import time

from bench.extraction.labels import Label, Score, judge_all, read_labels, total
from bench.extraction.pairs import judge_pairs, read_pairs
from extproc.worker.rules import RuleExtractor

ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--misses", action="store_true", help="what went wrong in the half that rules may be fitted to")
    arguments = parser.parse_args()
    labels = read_labels()
    rules = RuleExtractor()
    halves = {
        "dev": [label for label in labels if not label.is_held_out],
        "held out": [label for label in labels if label.is_held_out],
    }
    scores = {name: judge_all(half, rules)[0] for name, half in halves.items()}
    pairs = judge_pairs(read_pairs(), rules)
    cost = microseconds(labels, rules)
    if arguments.json:
        whole = {name: vars(total(half)) for name, half in scores.items()}
        print(json.dumps({**whole, "pairs": [pairs.precision, pairs.recall], "us": cost}))
        return
    print(table(scores))
    print(f"\nPairs: superseding precision {pairs.precision:.3f}, recall {pairs.recall:.3f}; ", end="")
    print(f"{pairs.merged} of {pairs.merged + len(pairs.unmerged)} repetitions merged.")
    print(f"CPU: {cost:.0f} µs a turn (median of {ROUNDS} rounds over all labelled turns).")
    if arguments.misses:
        for miss in judge_all(halves["dev"], rules)[1]:
            print(miss)


def table(scores: dict[str, dict[str, Score]]) -> str:
    """Markdown: a row for each kind of turn, then the sums, for both halves."""
    kinds = sorted({kind for half in scores.values() for kind in half})
    rows = [
        "| kind | turns | facts expected | precision | recall | held out: turns | expected | precision | recall |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    rows += [
        f"| {kind} | {' | '.join(_cells(half.get(kind, Score())) for half in scores.values())} |" for kind in kinds
    ]
    rows.append(f"| **all** | {' | '.join(_cells(total(half)) for half in scores.values())} |")
    for name, half in scores.items():
        whole = total(half)
        rows.append(
            f"\n{name}: {whole.right} right, {whole.found - whole.right} wrong, {whole.expected - whole.right} missed; "
            f"{whole.dated} of {whole.to_date} dates, {whole.corrections} of {whole.to_correct} corrections, "
            f"episode kept or left out as labelled {whole.episodes_right} of {whole.episodes}."
        )
    return "\n".join(rows)


def microseconds(labels: list[Label], rules: RuleExtractor) -> float:
    """CPU time of one turn, extraction only."""
    turns = [label.turns()[:1] for label in labels]
    times = []
    for _ in range(ROUNDS):
        begun = time.process_time()
        for turn in turns:
            rules.extract(turn)
        times.append(time.process_time() - begun)
    return sorted(times)[ROUNDS // 2] / len(turns) * 1e6


def _cells(score: Score) -> str:
    precision = f"{score.precision:.2f}" if score.found else "–"
    recall = f"{score.recall:.2f}" if score.expected else "–"
    return f"{score.turns} | {score.expected} | {precision} | {recall}"


if __name__ == "__main__":
    main()
