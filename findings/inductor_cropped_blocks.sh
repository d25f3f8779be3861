#!/usr/bin/env bash
# torch 2.13.0, torch.compile with Inductor on a CPU: rows that are scaled block by block and then cropped end in wrong numbers.
#
# Each block of a row is multiplied by its largest element, the blocks are laid out as a row again, and the first columns of
# it are kept, with a copy. If the crop ends inside a block, every kept element of that last block is wrong; whole blocks are
# right. There is no error and no warning. It is what packing to blocks (8-bit codes with a scale per block, padded rows)
# looks like in plain PyTorch. Handling the shorter last block apart from the others avoids it.
#
# Output seen (rows x blocks x elements, columns kept: wrong elements, and the first column that has any):
#     torch 2.13.0+cpu
#     7 x 3 x 128, 384 kept: 0 of 2688 wrong
#     7 x 3 x 128, 256 kept: 0 of 1792 wrong
#     7 x 3 x 128, 300 kept: 308 of 2100 wrong, from column 256
#     2 x 2 x 16, 20 kept: 8 of 40 wrong, from column 16
#     2 x 2 x 64, 70 kept: 12 of 140 wrong, from column 64
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q 'torch==2.13.0' numpy
cat > "$folder/cropped.py" <<'PYTHON'
import torch

print("torch", torch.__version__)


def cropped(x, block, kept):
    blocks = x.view(len(x), -1, block)
    blocks = blocks * blocks.amax(-1, keepdim=True)
    return blocks.view(len(x), -1)[:, :kept].contiguous()


found = []
for rows, count, block, kept in ((7, 3, 128, 384), (7, 3, 128, 256), (7, 3, 128, 300), (2, 2, 16, 20), (2, 2, 64, 70)):
    x = torch.rand(rows, count * block, generator=torch.Generator().manual_seed(0)) + 1
    torch._dynamo.reset()
    wrong = torch.compile(cropped)(x, block, kept) != cropped(x, block, kept)
    columns = wrong.any(0).nonzero().flatten().tolist()
    where = f", from column {columns[0]}" if columns else ""
    print(f"{rows} x {count} x {block}, {kept} kept: {int(wrong.sum())} of {wrong.numel()} wrong{where}")
    found.append(columns == list(range(kept // block * block, kept)))
assert all(found), "this has changed"
PYTHON
TORCHINDUCTOR_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/cropped.py"
