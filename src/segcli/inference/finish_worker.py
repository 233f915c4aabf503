"""The process that encodes and writes what was computed for pictures.

    python -m segcli.inference.finish_worker FD

It says that it is there, is told how, and then answers every picture with its entry for the manifest.
It never imports torch. Its parent is `finishing.Finishers`.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import sys

import cv2

from segcli.errors import MachineError
from segcli.inference.messages import receive_object, send, send_object


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group; the parent decides
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(fileno=int(sys.argv[1]))
    cv2.setNumThreads(1)  # there is a process for every core
    with contextlib.suppress(EOFError, OSError):  # the parent has gone
        send(connection, {"ready": True})
        finishing = receive_object(connection)
        while True:
            picture, result = receive_object(connection)
            try:
                answer = finishing.finished(picture, result)
            except MachineError as error:
                answer = error
            send_object(connection, answer)


if __name__ == "__main__":
    main()
