"""What stands for the processes of a study, so that its tests need none."""

from mmdit.config import load_config
from mmdit.train.trainer import train


def silent(text):
    pass


class Ended:
    """What stands for a process that has run."""

    def __init__(self, code):
        self.code = code

    def poll(self):
        return self.code

    def send_signal(self, number):
        pass


def in_process(command):
    """Train without a process of its own: what `python -m mmdit.train CONFIG --out DIR` does."""
    assert command[1:3] == ["-m", "mmdit.train"]
    train(load_config(command[3]), command[5], progress=False)
    return 0
