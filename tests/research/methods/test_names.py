import pytest

from research.methods import METHODS, KronA, LoRA, method_from
from research.methods.method import MethodError


@pytest.mark.parametrize("name", METHODS)
def test_by_name(name):
    method = method_from(name)
    assert method.name == name
    assert method == type(method)()
    assert method.label in method.description
    assert method_from(name, **method.options()) == method


def test_options():
    assert method_from("krona", a1=8, num_terms=2) == KronA(8, num_terms=2)
    assert method_from("krona", factor_pattern={"to_k": [2, 8]}) == KronA(factor_pattern={"to_k": (2, 8)}) != KronA()
    assert "rank=8" in method_from("lora", rank=8).description
    assert method_from("lora", text_encoders=True).description.endswith("denoiser and text encoders")


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("lorra", {}, "did you mean lora"),
        ("SVDiff", {}, "There are: krona, lora"),
        ("lora", {"rnak": 4}, "did you mean rank"),
        ("svdiff", {"a1": 4}, "There are: text_encoders"),
        ("lora", {"rank": 0}, "rank must be"),
        ("lora", {"rank": None}, "rank must be"),
        ("loha", {"rank": None}, "rank must be"),
        ("lokr", {"rank": 1.5}, "rank must be"),
        ("lokr", {"factor": 0}, "factor must be"),
        ("loha", {"alpha": float("nan")}, "alpha must be"),
        ("lora", {"targets": "("}, "targets has"),
        ("krona", {"a1": 0}, "a1, a2"),
        ("krona", {"factor_pattern": {"to_k": (2,)}}, "to_k"),
        ("krona", {"targets": "("}, "not a regular expression"),
        ("dreambooth", {"text_encoders": 1}, "True or False"),
        ("custom-diffusion", {"text_encoders": True}, "no cross-attention"),
    ],
)
def test_what_there_is_not(name, options, said):
    with pytest.raises(MethodError, match=r".*" + said.replace("(", r"\(")):
        method_from(name, **options)


def test_a_method_is_a_value():
    assert LoRA(4) == LoRA(4) != LoRA(8)
    assert len({LoRA(4), LoRA(4), KronA()}) == 2
