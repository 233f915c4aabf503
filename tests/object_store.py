"""An S3 server on the loopback interface that notes what it is asked, and can be told to refuse."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

ERROR = '<?xml version="1.0"?><Error><Code>{0}</Code><Message>{0} as the test wants</Message></Error>'
Refuse = Callable[[str, str], tuple[str, str] | None]


class Quiet(WSGIRequestHandler):
    def log(self, *_: Any) -> None:
        pass


class Store:
    """moto's S3 behind a gate.

    `refuse` gets the method and path of every request, such as "PUT", "/bucket/a.png", and returns a status
    and an S3 error code, or None to let it pass.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.refuse: Refuse = lambda method, path: None
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=Quiet)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def _answer(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"].encode("latin-1").decode()
        self.requests.append((method, path))
        if refusal := self.refuse(method, path):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start(refusal[0], [("Content-Type", "application/xml")])
            return [ERROR.format(refusal[1]).encode()]
        return self._moto(environ, start)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Stop, and forget all buckets."""
        httpx.post(f"{self.address}/moto-api/reset")
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use it."""
        return {
            "AWS_ENDPOINT_URL": self.address,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@contextlib.contextmanager
def serving(environment: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store that runs, with an empty bucket named "bucket", for this process and those it starts."""
    from segcli.inference import remote

    store = Store()
    for name, value in store.environment.items():
        environment.setenv(name, value)
    remote._filesystem.cache_clear()
    try:
        driver().call_s3("create_bucket", Bucket="bucket")
        yield store
    finally:
        remote._filesystem.cache_clear()
        store.close()


def driver() -> Any:
    import fsspec

    return fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)


def put(name: str, data: bytes) -> None:
    """Make an object in the bucket."""
    driver().call_s3("put_object", Bucket="bucket", Key=name, Body=data)


def put_tree(folder: Path, name: str) -> None:
    """Copy a folder of this machine into the bucket."""
    s3 = driver()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            key = f"{name}/{path.relative_to(folder).as_posix()}"
            s3.call_s3("put_object", Bucket="bucket", Key=key, Body=path.read_bytes())


def objects(name: str) -> dict[str, bytes]:
    """Everything below a folder of the bucket, by its name there."""
    s3 = driver()
    page = s3.call_s3("list_objects_v2", Bucket="bucket", Prefix=f"{name}/")
    assert not page["IsTruncated"]
    keys = [found["Key"] for found in page.get("Contents", ())]
    return {key.removeprefix(f"{name}/"): s3.cat_file(f"bucket/{key}") for key in keys}
