"""What the tests mend in Triton's interpreter.

It cuts off bits where a GPU rounds to the nearest bfloat16. And for every function that a kernel calls it makes all of the
language its own anew, which takes half of its time.
"""

import numpy as np
import torch


def mend() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_as_torch_does(values, source, target, rounding_mode):
        values = np.ascontiguousarray(values)
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(values.view(np.float32)).bfloat16().view(torch.uint16).numpy()
        if (source, target) == (tl.bfloat16, tl.float32):
            return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16).float().view(torch.uint32).numpy()
        return convert(values, source, target, rounding_mode)

    interpreter._convert_float = convert_as_torch_does

    patch = interpreter._patch_lang
    patched = set()  # languages, each as its module, since the launch began

    class Scope:
        def __init__(self, scope):
            self.scope = scope

        def restore(self):  # the launch ends
            patched.clear()
            self.scope.restore()

    def patch_once(function):
        languages = frozenset(m.__name__ for m in function.__globals__.values() if m is tl or m is tl.core)
        if languages in patched:
            return None
        patched.add(languages)
        return Scope(patch(function))

    interpreter._patch_lang = patch_once
