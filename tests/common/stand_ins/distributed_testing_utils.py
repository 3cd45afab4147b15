"""Processes for the tests on several ranks: gloo on the CPU, or what torch names for the accelerator that is there.

The ranks are forked from a server process that has imported the libraries once, instead of importing them again each.
"""

import multiprocessing
import os
import pickle
import sys
from functools import wraps
from multiprocessing import forkserver
from unittest import mock

import rank_process
import torch
import torch.distributed as dist


def _get_distributed_device_type() -> str:
    accelerator = torch.accelerator.current_accelerator()
    return "cpu" if accelerator is None else accelerator.type


def _get_distributed_backend() -> str:
    return dist.get_default_backend_for_device(_get_distributed_device_type())


def _get_rank_device(rank: int) -> torch.device:
    device_type = _get_distributed_device_type()
    return torch.device(device_type) if device_type == "cpu" else torch.device(device_type, rank)


def _set_rank_device(rank: int) -> None:
    if _get_distributed_device_type() != "cpu":
        torch.accelerator.set_device_index(rank)


def _start_rank_processes(function, args: tuple = (), nprocs: int = 2) -> None:
    """Run `function(rank, *args)` in `nprocs` processes; the first exception is raised here."""
    multiprocessing.set_forkserver_preload([rank_process.__name__])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # older Pythons do not pass `sys.path` on
        forkserver.ensure_running()
    torch.multiprocessing.start_processes(
        rank_process.run, args=(pickle.dumps((function, args)),), nprocs=nprocs, start_method="forkserver"
    )


def _in_process_group(rank: int, function, args: tuple, world_size: int, host: str, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR=host, MASTER_PORT=str(port)
    )
    _set_rank_device(rank)
    store = dist.TCPStore(host, port, is_master=False)
    dist.init_process_group(_get_distributed_backend(), store=store, rank=rank, world_size=world_size)
    try:
        function(rank, *args)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run_distributed(world_size: int):
    """Decorator: the call of `function(*args)` becomes `function(rank, *args)` on `world_size` ranks."""

    def decorate(function):
        @wraps(function)
        def run(*args):
            store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            _start_rank_processes(
                _in_process_group, (function, args, world_size, store.host, store.port), nprocs=world_size
            )

        return run

    return decorate
