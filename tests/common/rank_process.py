"""What a rank of a distributed test runs; imported once by the server that the ranks are forked from."""

import pickle

import library_tests
import torch

import hkt_hf  # noqa: F401  (registers the Auto classes)


def run(rank: int, call: bytes) -> None:
    """Run the pickled `(function, args)`; the function may live in the library's tests."""
    torch.set_num_threads(1)
    library_tests.install()
    function, args = pickle.loads(call)
    function(rank, *args)
