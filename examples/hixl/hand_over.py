import multiprocessing as mp
import numpy as np
from llm_datadist.hixl import SUCCESS, Hixl, MemDesc, MemType, TransferOp, TransferOpDesc


def engine(name, tensor):
    hixl = Hixl()
    assert hixl.initialize(name) == SUCCESS
    hixl.register_mem(MemDesc(tensor.ctypes.data, tensor.nbytes), MemType.MEM_HOST)
    return hixl


def produce(pipe):
    tensor = np.arange(1_000_000, dtype=np.float32)
    kept = engine("127.0.0.1:26000", tensor)
    pipe.send(tensor.ctypes.data)  # the address is all that the other process needs
    pipe.recv()  # until it has read
    kept.finalize()


if __name__ == "__main__":
    pipe, theirs = mp.Pipe()
    mp.get_context("spawn").Process(target=produce, args=(theirs,)).start()
    tensor = np.zeros(1_000_000, dtype=np.float32)
    hixl = engine("127.0.0.1", tensor)
    pieces = [TransferOpDesc(tensor.ctypes.data, pipe.recv(), tensor.nbytes)]
    assert hixl.connect("127.0.0.1:26000", 5000) == SUCCESS
    assert hixl.transfer_sync("127.0.0.1:26000", TransferOp.READ, pieces, 5000) == SUCCESS
    print(tensor[-1], "by", hixl.links()[0].path)
    pipe.send("done")
