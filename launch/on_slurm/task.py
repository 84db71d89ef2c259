"""`python -m launch.on_slurm.task`: the program of each task of a Slurm step, which the launcher starts by srun.

It reads from its standard input where the launcher listens (srun gives the same line to every task), connects to it,
says which task it is, and becomes an agent (launch/forking/agent.py): the launcher tells it when to fork its rank.
"""

import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import asdict
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

from launch.forking.agent import RankAgent
from launch.rank.place import ALONE, rank_from_environment
from launch.rank.signals import SIGNALS
from launch.supervision.attempt import import_for_ranks
from llmtrain.messages import show_messages


def main() -> None:
    """Serve the launcher until it is gone. Ends with exit code 1 where it cannot be reached."""
    # Slurm sends signals to all processes of a step: the rank saves, and its agent has to outlive that.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    show_messages()
    told = json.loads(sys.stdin.readline())
    place = rank_from_environment(os.environ) or ALONE
    try:
        control = _connect(os.environ, told)
        said = {"say": "here", "place": asdict(place), "host": socket.gethostname()}
        control.send_bytes(json.dumps(said).encode())
        import_for_ranks(told["engine"])  # after `here`: the launcher knows of this task meanwhile
        control.send_bytes(json.dumps({"say": "ready"}).encode())
    except (OSError, EOFError, AuthenticationError) as error:
        sys.exit(f"{place}: the launcher cannot be reached at port {told['port']}: {error}")
    RankAgent(control).run()


def _connect(environment: Mapping[str, str], told: Mapping[str, str]) -> Connection:
    """The connection to the launcher: both ends prove that they know the key, which is sent nowhere."""
    host = environment.get("SLURM_LAUNCH_NODE_IPADDR") or told["host"]
    connected = socket.create_connection((host, int(told["port"])), timeout=float(told["timeout_seconds"]))
    connected.settimeout(None)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    control = Connection(connected.detach())
    key = bytes.fromhex(told["key"])
    answer_challenge(control, key)
    deliver_challenge(control, key)
    return control


if __name__ == "__main__":
    main()
