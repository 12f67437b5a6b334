import logging
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from hf_vq import hub_requests
from hf_vq.hub_requests import request_patiently
from hf_vq.training import sharing


class Refusal(HfHubHTTPError):
    def __init__(self, status, **headers):
        OSError.__init__(self, f"status {status}")
        self.response = SimpleNamespace(status_code=status, headers=headers)


@pytest.fixture
def clock(monkeypatch):
    """Time that passes by sleeping only; the pauses."""
    pauses = []
    monkeypatch.setattr(hub_requests.time, "monotonic", lambda: sum(pauses))
    monkeypatch.setattr(hub_requests.time, "sleep", pauses.append)
    return pauses


def answers(*errors):
    left = list(errors)

    def request():
        if left:
            raise left.pop(0)
        return "done"

    return request


def test_a_busy_hub_is_asked_again(clock, caplog):
    request = answers(Refusal(503), Refusal(429, **{"Retry-After": "17"}), Refusal(500))
    with caplog.at_level(logging.WARNING):
        assert request_patiently(request) == "done"
    assert clock == [1.0, 17.0, 4.0] and "429: once more in 17 seconds" in caplog.text


def test_it_is_not_asked_for_ever(clock):
    with pytest.raises(HfHubHTTPError, match="status 502"):
        request_patiently(answers(*[Refusal(502)] * 1000), minutes=3)
    assert sum(clock) <= 180 and clock[-1] == 60.0


def test_a_large_file_is_sent_again_too(clock):
    """huggingface_hub wraps what went wrong with a file that it uploads before the commit."""

    def wrapped(refusal):
        error = RuntimeError("Error while uploading 'a.safetensors'")
        error.__cause__ = refusal
        return error

    assert request_patiently(answers(wrapped(Refusal(503)))) == "done" and clock == [1.0]
    with pytest.raises(PermissionError, match="HF_TOKEN"):
        request_patiently(answers(wrapped(Refusal(403))))
    for error in (wrapped(Refusal(400)), wrapped(OSError("no network")), RuntimeError("other")):
        with pytest.raises(RuntimeError):
            request_patiently(answers(error))
    assert clock == [1.0]


@pytest.mark.parametrize("error", [LocalTokenNotFoundError("none"), Refusal(401), Refusal(403)])
def test_who_may_not_write_is_told_how_to_log_in(clock, error):
    with pytest.raises(PermissionError, match="hf auth login.*HF_TOKEN"):
        request_patiently(answers(error))
    assert clock == []


def test_other_refusals_are_final(clock):
    with pytest.raises(HfHubHTTPError, match="status 404"):
        request_patiently(answers(Refusal(404)))
    assert clock == []


def test_a_failed_push_says_that_the_model_is_saved(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError("no token.")

    monkeypatch.setattr(sharing, "push_saved", refuse)
    monkeypatch.setattr(sharing, "training_card", lambda *args: None)
    monkeypatch.setattr(
        sharing, "save_for_sharing", lambda folder, *args, **kwargs: (folder / "a").write_text("model")
    )
    arguments = SimpleNamespace(push_to_hub=True, hub_model_id="me/it", hub_license="mit")
    run = SimpleNamespace(output_dir=tmp_path, arguments=arguments)
    with pytest.raises(
        RuntimeError, match="the model is saved in .*tokenizer, but was not pushed to 'me/it': no token. The same"
    ):
        sharing.save_trained(run, object(), "tokenizer", None)
    assert (tmp_path / "tokenizer/a").read_text() == "model"
