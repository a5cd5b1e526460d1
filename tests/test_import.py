import subprocess
import sys

PROBE = """
import sys
import torch
before = {name.split('.')[0] for name in sys.modules}
import boft
assert not torch.cuda.is_initialized()
added = {name.split('.')[0] for name in sys.modules} - before - set(sys.stdlib_module_names)
print(*sorted(added), boft.__version__)
"""


def test_import_brings_torch_and_safetensors_only_and_leaves_cuda_alone():
    result = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    *added, version = result.stdout.split()
    assert set(added) <= {"boft", "safetensors", "packaging"}
    assert version
