"""A running server of a tiny model in this process, on loopback."""

import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

from coati.dataset.chat.conversation import Conversation
from coati.inference.model_loading import Loaded
from coati.inference.serve.inference_engine import InferenceEngine
from coati.models.generation.sampling import Sampling
from tests.tiny import tiny_llama, tiny_tokenizer

GREEDY = Sampling(do_sample=False)
NAME = "tiny"


def tiny_loaded():
    tokenizer = tiny_tokenizer()
    return Loaded(tiny_llama(layers=1).eval(), tokenizer, Conversation.from_config(tokenizer, {}))


@contextmanager
def engine_of(endless=False, pause=0.0, loaded=None, **settings):
    """An engine; ``endless``: no response stops by itself, ``pause``: seconds that a token takes at
    least; ``loaded``: another model than the tiny one."""
    engine = InferenceEngine(
        loaded or tiny_loaded(), **{"max_length": 512, "timeout": 60.0} | settings
    )
    if endless:
        engine.stops = []
    if pause:
        step = engine._step
        engine._step = lambda: (time.sleep(pause), step())
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def running(web=None, **settings):
    """The server: ``url``, ``engine``. ``web``: fields of WebSettings."""
    import uvicorn

    from coati.cli.serve import listening_socket
    from coati.inference.serve.web import WebSettings, make_app

    with engine_of(**settings) as engine:
        app = make_app(
            engine, WebSettings(NAME, **{"sampling": GREEDY, "max_new_tokens": 400} | (web or {}))
        )
        listening = listening_socket("127.0.0.1", 0)
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield SimpleNamespace(
                url=f"http://127.0.0.1:{listening.getsockname()[1]}", engine=engine, app=app
            )
        finally:
            server.should_exit = True
            thread.join(20)


def until(condition, seconds=20.0):
    """Wait for ``condition``; whether it came true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False
