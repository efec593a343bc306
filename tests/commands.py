"""Commands that several tests type."""

from saltflat.lab.cli import main

QUICK = [
    "--data.examples", "60", "--data.validation-examples", "20", "--optimizer.epochs", "2", "--model.width", "4",
    "--evaluation.examples", "30", "--attack.steps", "2", "--evaluation.steps", "2", "--threads", "1",
]  # fmt: skip


def run(*arguments):
    main([str(word) for word in arguments])
