import pytest
from data_cases import KEY


@pytest.fixture
def no_waits(monkeypatch):
    """A key for endpoints, and no waits between tries; returns the list of seconds that were skipped."""
    listed = []

    async def pause(seconds):
        listed.append(seconds)

    monkeypatch.setattr("anyio.sleep", pause)  # of the openai package
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "*")
    return listed
