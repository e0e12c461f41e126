"""One rank of a job that only holds its lifeline: it does what its stdin orders, and is stuck meanwhile.

python lifeline_rank.py RANK SIZE GRACE
"""

import ctypes
import os
import signal
import sys

from geo_r1.train.parallel import lifeline


class Pipes:
    """A store whose keys go out by stdout and come in by stdin."""

    def __init__(self):
        self.values = {}

    def set(self, key, value):
        print(key, value, flush=True)

    def get(self, key):
        while key not in self.values:
            name, value = sys.stdin.readline().split(maxsplit=1)
            self.values[name] = value.encode()
        return self.values[key]


def fork(line):
    """A child that would hold all that it inherits, until it is killed; it is no rank."""
    pid = os.fork()
    if pid == 0:
        os.close(1)
        assert line.reason(60) is None  # at once
        line.close()
        signal.pause()
    return pid


def main():
    rank, size, lifeline.GRACE = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    line = lifeline.Lifeline.start(rank, size, Pipes(), "127.0.0.1")
    print("here", flush=True)
    while order := sys.stdin.readline():
        word, _, rest = order.strip().partition(" ")
        match word:
            case "fail":
                answer = line.fail(rest)
            case "crash":
                answer = line.fail(rest, lifeline.OTHER)
            case "close":
                answer = line.close()
            case "reason":
                answer = line.reason(float(rest))
            case "fork":
                answer = fork(line)
            case "leave":
                sys.exit(line.exit_code + int(rest))
            case "hang":  # and let no other thread of the interpreter run
                answer = ctypes.PyDLL(None).sleep(60)
            case "ping":
                answer = rank
        print(answer, flush=True)


if __name__ == "__main__":
    main()
