import multiprocessing as mp
import numpy as np
from llm_datadist.hixl import Hixl, MemDesc, MemType, TransferOp, TransferOpDesc


def engine(name, tensor):
    hixl = Hixl()
    assert hixl.initialize(name, {"AutoConnect": "1"}) == 0
    hixl.register_mem(MemDesc(tensor.ctypes.data, tensor.nbytes), MemType.MEM_HOST)
    return hixl


def produce(pipe):
    tensor = np.arange(1_000_000, dtype=np.float32)
    _kept = engine("127.0.0.1:26000", tensor)
    pipe.send(tensor.ctypes.data)  # the address is all that the other process needs
    pipe.recv()  # until the program ends


if __name__ == "__main__":
    pipe, theirs = mp.get_context("spawn").Pipe()
    mp.get_context("spawn").Process(target=produce, args=(theirs,), daemon=True).start()
    tensor = np.zeros(1_000_000, dtype=np.float32)
    hixl, name = engine("127.0.0.1", tensor), "127.0.0.1:26000"
    pieces = [TransferOpDesc(tensor.ctypes.data, pipe.recv(), tensor.nbytes)]
    print(hixl.transfer_sync(name, TransferOp.READ, pieces, 5000), tensor[-1])
