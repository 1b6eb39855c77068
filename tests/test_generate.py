"""generate.py: what is wrong with its flags, and answers of an untrained model."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny.data import encoded, picture
from tiny.grades import make_model

from data.easy_vqa import NAME, VOCAB_SIZE
from generate import main, parse_arguments


def test_everything_wrong_with_the_flags_is_told_without_torch(tmp_path):
    code = "import sys; sys.modules['torch'] = None; import generate; generate.parse_arguments()"
    wrong = {"max_new_tokens": 0, "temperature": -1.0, "top_k": -3, "top_p": 0.0, "generations": 0}
    flags = ["--prompt=?", "--image", "absent.png", "two words.png", f"--checkpoint={tmp_path}"]
    flags += [f"--{name}={value}" for name, value in wrong.items()]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 2
    told = [f"--{name} {value}" for name, value in wrong.items()]
    for problem in (*told, "--image absent.png", "--image 'two words.png'", f"--checkpoint {tmp_path}"):
        assert problem in done.stderr


def test_answers_and_an_image_that_is_none(tmp_path, capsys):
    make_model(lm_base_vocab_size=VOCAB_SIZE, lm_tokenizer=NAME).save_pretrained(tmp_path)
    for name, content in {"a.png": encoded(picture()), "b.png": b"not an image"}.items():
        (tmp_path / name).write_bytes(content)
    flags = ["--checkpoint", str(tmp_path), "--prompt", "what color?", "--max_new_tokens", "3", "--generations", "2"]
    main(parse_arguments([*flags, "--image", str(tmp_path / "a.png")]))
    assert len(capsys.readouterr().out.splitlines()) == 2
    with pytest.raises(ValueError, match=r"--image .*b\.png"):
        main(parse_arguments([*flags, "--image", str(tmp_path / "b.png")]))
