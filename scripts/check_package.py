"""The library as people install it: build wheel and sdist, check what they hold and how an index would show them.

python scripts/check_package.py
python scripts/check_package.py --install

With --install also in a bare environment: the wheel brings PyTorch alone, imports nothing heavy and trains in a plain
loop; then, with the extra hf, in transformers' Trainer. Needs uv and a package index (minutes without its cache).
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOOP = """
import sys, torch, grades
model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
optimizer = torch.optim.AdamW(model.parameters())
config = grades.GradESConfig(language_tau=1e9, alpha=0.5)
monitor = grades.GradESMonitor(config, model, optimizer, total_steps=10)
for step in range(1, 11):
    model(torch.randn(4, 3, 8)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if monitor.after_step(step):
        break
assert step == 6 and len(monitor.frozen) == 8, (step, monitor.frozen)
heavy = {"transformers", "matplotlib", "pandas", "wandb", "peft", "datasets"} & sys.modules.keys()
assert not heavy, heavy
print("a plain loop:", len(monitor.frozen), "matrices froze at step", step, "with torch", torch.__version__)
"""
TRAINER = """
import torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from grades import GradEarlyStoppingCallback, GradEarlyStoppingConfig
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(64, (48, 12)).tolist()]
callback = GradEarlyStoppingCallback(GradEarlyStoppingConfig(tau=1e9, alpha=0.5, output_dir="out"))
arguments = TrainingArguments("run", max_steps=12, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True)
Trainer(LlamaForCausalLM(config), arguments, train_dataset=rows, callbacks=[callback]).train()
assert len(callback.frozen_components) == 14 and callback.current_training_step == 7
print("Trainer:", len(callback.frozen_components), "matrices froze with transformers", transformers.__version__)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true", help="install the wheel in a bare environment and train")
    install = parser.parse_args().install
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run("uv", "build", "--quiet", "--out-dir", "dist", str(ROOT), cwd=folder)
        (wheel,), (sdist,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
        check_contents(wheel, sdist)
        run("uvx", "--quiet", "twine", "check", "--strict", str(wheel), str(sdist), cwd=folder)
        if install:
            train_in_bare_environment(wheel, folder)


def run(*command: str, cwd: Path) -> None:
    """Run it, and end with its exit status where it fails."""
    if status := subprocess.run(command, cwd=cwd).returncode:
        sys.exit(status)


def check_contents(wheel: Path, sdist: Path) -> None:
    """Both hold every file of the library and no other room; raises AssertionError."""
    ours = {f"grades/{path.name}" for path in (ROOT / "grades").iterdir() if path.suffix in (".py", ".typed")}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == ours, f"the wheel: {sorted(held ^ ours)}"
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    code = {name for name in names if name.endswith((".py", ".typed"))}
    assert code == ours, f"the sdist: {sorted(code ^ ours)}"
    assert {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml"} <= names
    print(f"{wheel.name} and {sdist.name}: {len(ours)} files of the library each")


def train_in_bare_environment(wheel: Path, folder: Path) -> None:
    """In a new environment outside the checkout: first the wheel alone, then with the extra hf."""
    python = str(folder / "bare" / "bin" / "python")
    run("uv", "venv", "--quiet", "--python", sys.executable, "bare", cwd=folder)
    for extra, code in (("", LOOP), ("[hf]", TRAINER)):
        run("uv", "pip", "install", "--quiet", "--python", python, f"{wheel}{extra}", cwd=folder)
        run(python, "-c", code, cwd=folder)


if __name__ == "__main__":
    main()
