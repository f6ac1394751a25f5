"""Prints docs/options.md from the command lines of fedu.py and eval.py: `python -m report.reference > docs/options.md`."""

from __future__ import annotations

import argparse

from options import evaluation_parser, training_parser


def as_markdown(parser: argparse.ArgumentParser) -> str:
    """A parser's options as Markdown, a table for each group. A help text gives its default at its end, in brackets after two spaces."""
    lines = []
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        if actions:
            lines += [f"### {group.title.capitalize()}", "", *([group.description, ""] if group.description else [])]
            lines += ["| option | default | |", "|---|---|---|"]
        for action in actions:
            text, _, default = action.help.partition("  [")
            names = " ".join(filter(None, (*action.option_strings, action.metavar)))
            values = ", ".join(f"`{value}`" for value in action.choices) + ": " if action.choices else ""
            lines.append(f"| `{names}` | {default.removesuffix(']')} | {values}{text} |")
        lines += [""] if actions else []
    return "\n".join(lines).rstrip()


def documentation() -> str:
    """What docs/options.md holds."""
    training, evaluation = as_markdown(training_parser()), as_markdown(evaluation_parser())
    return "\n\n".join(["# Options", "## Options of `fedu.py`", training, "## Options of `eval.py`", evaluation])


if __name__ == "__main__":
    print(documentation())
