"""`llmtrain serve --replicas`: as one server for its clients, whatever becomes of a replica; nothing is left behind."""

import ipaddress
import signal
import tempfile
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from llmtrain.infer.packed.products import sums_are_exact
from tests.support.command import ENVIRONMENT, TIMEOUT_SECONDS, llmtrain, wait_until
from tests.support.hf_folders import write_llama
from tests.support.ray_cluster import ray_head
from tests.support.servers import KEY, Server, served

on_ray = [
    pytest.mark.whole_grid,
    pytest.mark.skipif(find_spec("fastapi") is None, reason="Ray Serve is not installed: pip install -e .[replicas]"),
]
OPTIONS = ("--slots", "4", "--max-queue", "8", "--max-tokens", "50", "--max-body", "100000")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("served") / "llama")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with served(folder, "--replicas", "2", *OPTIONS) as found:
        yield found


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0)


def processes_of(server: Server) -> list[psutil.Process]:
    """All that the command has started."""
    return psutil.Process(server.process.pid).children(recursive=True)


def replicas_of(server: Server) -> list[psutil.Process]:
    """What Ray shows as `ray::ServeReplica:...`; the system cuts names off."""
    return [process for process in processes_of(server) if process.name().startswith("ray::ServeRepl")]


def health(server: Server) -> dict[str, Any]:
    return httpx.get(f"{server.url.removesuffix('/v1')}/health", timeout=TIMEOUT_SECONDS).json()


def asked(client: openai.OpenAI, **more: Any) -> Any:
    return client.completions.create(model="llama", prompt="the quick", seed=1, **{"max_tokens": 40, **more})


def everything(client: openai.OpenAI) -> list[Any]:
    """Answers of all kinds, without what differs from call to call."""
    messages: Any = [{"role": "user", "content": "the quick"}]
    chat = client.chat.completions
    texts = asked(client, n=3, logprobs=2).choices
    pieces = list(chat.create(model="llama", messages=messages, seed=1, max_tokens=8, stream=True))
    faults = list[tuple[int, str]]()
    for more in (
        {"max_tokens": 51},
        {"model": "other"},
        {"n": 13},
        {"prompt": "a" * 100_000},
        {"extra_body": {"x": 1}},
    ):
        with pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(**{"model": "llama", "prompt": "a", **more})
        faults.append((caught.value.status_code, caught.value.message))
    return [
        [model.id for model in client.models.list()],
        [(choice.text, choice.finish_reason, choice.logprobs) for choice in texts],
        chat.create(model="llama", messages=messages, seed=1, max_tokens=8).choices[0].message.content,
        "".join(piece.choices[0].delta.content or "" for piece in pieces),
        client.embeddings.create(model="llama", input="the quick").data[0].embedding,
        faults,
    ]


class TestReplicas:
    pytestmark = on_ray

    def test_answers_are_those_of_one_process(self, folder: Path, server: Server) -> None:
        with served(folder, *OPTIONS) as alone:
            assert everything(client_of(server)) == everything(client_of(alone))
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=server.url, api_key="wrong", max_retries=0).models.list()

    def test_the_key_is_nowhere_on_the_cluster(self, server: Server) -> None:
        for process in processes_of(server):
            assert KEY not in " ".join(process.cmdline()) and KEY not in process.environ().values()

    def test_nothing_listens_beyond_this_machine(self, server: Server) -> None:
        for process in processes_of(server):
            for connection in process.net_connections("inet"):
                address = connection.laddr.ip.removeprefix("::ffff:") if connection.laddr else ""
                if connection.status == psutil.CONN_LISTEN:
                    assert ipaddress.ip_address(address).is_loopback, (process.name(), connection.laddr)

    def test_a_killed_replica_loses_only_its_own_streams(self, server: Server) -> None:
        ended, stops = list[str](), threading.Event()

        def ask(stream: bool) -> None:
            client = client_of(server)
            while not stops.is_set():
                try:
                    answer = asked(client, temperature=0, stream=stream)
                    last = list(answer)[-1] if stream else answer
                    ended.append(f"{stream} {last.choices[0].finish_reason}")
                except openai.APIError as error:
                    ended.append(f"{stream} {error.code}")

        threads = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True) * 3]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(ended) > 20, server.process)
        killed = replicas_of(server)[0]
        killed.kill()
        wait_until(lambda: health(server)["replicas"] == 1, server.process)
        wait_until(lambda: health(server)["replicas"] == 2, server.process)
        assert killed.pid not in [process.pid for process in replicas_of(server)]
        count = len(ended)
        wait_until(lambda: len(ended) > count + 20, server.process)
        stops.set()
        for thread in threads:
            thread.join()
        lost = [end for end in ended if not end.endswith(("length", "stop"))]
        assert set(lost) <= {"True replica_lost"} and len(lost) <= 3
        assert not set(ended[count:]) & set(lost), "since there are two again"

    def test_a_client_that_leaves_frees_its_slot_in_the_replica(self, server: Server) -> None:
        for _ in range(4):
            stream = asked(client_of(server), stream=True, n=8)
            next(iter(stream))
            stream.close()
        wait_until(lambda: not any(figures(server, "open_texts")), server.process)

    def test_a_burst_is_shared_and_the_rest_told_to_come_back(self, server: Server) -> None:
        before, streams, refused = figures(server, "new_tokens_total"), [], list[openai.RateLimitError]()
        for _ in range(8):
            try:
                streams.append(asked(client_of(server), stream=True, n=12, max_tokens=50))
            except openai.RateLimitError as error:
                refused.append(error)
        assert len(streams) >= 2 and all(error.response.headers["retry-after"] == "1" for error in refused)
        for stream in streams:
            stream.close()
        assert all(now > then for now, then in zip(figures(server, "new_tokens_total"), before, strict=True))

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_told_to_stop_it_ends_what_was_begun_and_leaves_nothing(self, folder: Path, number: signal.Signals) -> None:
        # Ray's folder goes into this one, whose path must be short.
        with tempfile.TemporaryDirectory(dir="/tmp") as place:
            environ = {**ENVIRONMENT, "TMPDIR": place}
            with served(folder, "--replicas", "1", "--name", "tiny", environ=environ) as server:
                client, left = client_of(server), processes_of(server)
                expected = client.completions.create(model="tiny", prompt="a", max_tokens=60, seed=1).choices[0].text
                stream = client.completions.create(model="tiny", prompt="a", max_tokens=60, seed=1, stream=True)
                text = next(iter(stream)).choices[0].text
                assert len(list(Path(place).glob("llmtrain-ray-*"))) == 1
                server.process.send_signal(number)
                assert text + "".join(piece.choices[0].text for piece in stream) == expected
                assert server.process.wait(TIMEOUT_SECONDS) == 0
            assert psutil.wait_procs(left, timeout=0)[1] == [], "the command waits for them"
            assert list(Path(place).iterdir()) == []
        said = (folder.parent / "server.txt").read_text()
        assert KEY not in said and "Traceback" not in said

    def test_each_keeps_quantized_matrices_in_whole_numbers(self, folder: Path, tmp_path: Path) -> None:
        if not sums_are_exact():
            pytest.skip("this CPU has no VNNI")
        (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 100)
        given = ("--scheme", "w8a16", "--evaluate", "text.txt", "--samples", "4", "--max-perplexity-increase", "10")
        made = llmtrain("compress", folder, "w8", *given, folder=tmp_path)
        assert made.returncode == 0, made.stderr
        answers = list[str]()
        for options in (("--replicas", "1", "--kernels", "packed"), ("--kernels", "plain")):
            with served(tmp_path / "w8", *options) as server:
                answer = client_of(server).completions.create(model="w8", prompt="the quick", temperature=0)
                answers.append(answer.choices[0].text)
            if "--replicas" in options:
                said = (tmp_path / "server.txt").read_text()
                assert "1 replica, each with" in said
                assert "kernels: 14 of 14 matrices multiplied as 8-bit numbers with exact sums" in said
        assert answers[0] == answers[1] != ""
        none = llmtrain("serve", folder, "--port", "0", "--replicas", "1", "--kernels", "packed", folder=tmp_path)
        assert none.returncode == 2 and "no matrix of the model is in whole numbers" in none.stderr

    def test_killed_it_leaves_nothing(self, folder: Path) -> None:
        with served(folder, "--replicas", "1") as server:
            left = processes_of(server)
            server.process.kill()
            assert psutil.wait_procs(left, timeout=TIMEOUT_SECONDS)[1] == []

    def test_a_cluster_that_stands_is_joined_and_given_back(self, folder: Path) -> None:
        with ray_head(num_cpus=3) as head:
            (node,) = head.nodes
            before = {process.pid for process in node.processes()}
            environ = {**head.environ, "RAY_AUTH_MODE": ""}
            for ends_it in (signal.SIGTERM, signal.SIGKILL):
                with served(folder, "--replicas", "2", "--ray-address", head.address, environ=environ) as server:
                    assert client_of(server).completions.create(model="llama", prompt="a").choices[0].text
                    replicas = node.processes("ray::ServeRepl")
                    assert len(replicas) == 2
                    server.process.send_signal(ends_it)
                    server.process.wait(TIMEOUT_SECONDS)
                assert psutil.wait_procs(replicas, timeout=TIMEOUT_SECONDS)[1] == []
                if ends_it == signal.SIGTERM:
                    assert node.processes("ray::Serve") == [], "Ray Serve was started for it"
            assert before <= {process.pid for process in node.processes()}, "it goes on without us"


def figures(server: Server, name: str) -> list[float]:
    """Of each replica."""
    page = httpx.get(f"{server.url.removesuffix('/v1')}/metrics", headers=server.headers, timeout=TIMEOUT_SECONDS).text
    return [float(line.split()[-1]) for line in page.splitlines() if line.startswith(f"llmtrain_{name}{{")]
