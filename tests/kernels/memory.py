"""Fresh memory that shows when nobody writes to it, and CUDA graphs."""

import torch


def poison_fresh_memory(monkeypatch):
    """From now on fresh memory is NaN, and 77 or True where there is no NaN."""

    def poisoned(make):
        def new(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x.fill_(77)

        return new

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    assert torch.empty(1).isnan() and torch.ones(1).new_empty(1).isnan()


def replay(step, change=lambda: None):
    """The result of a step from a CUDA graph, captured after one run; `change` comes before the replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    change()
    graph.replay()
    torch.cuda.synchronize()
    return captured
