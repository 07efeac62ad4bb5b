"""The commands of demo_rlhf.sh, with a stand-in for Python that writes them down."""

from coati.cli.compare import parse_compare
from coati.experience_buffer.batch_sizes import optimizer_steps_per_pass
from tests.cli.flat import parse_ppo, parse_rm
from tests.demo.test_demo_preferences import called_by, messages


def test_models_that_are_there_are_taken_and_the_same_ones_are_compared(tmp_path):
    for name in ("sft", "rm"):
        (tmp_path / name).mkdir()
    sft, rm = str(tmp_path / "sft"), str(tmp_path / "rm")
    called = called_by("demo_rlhf.sh", tmp_path, SFT=sft, RM=rm, EPISODES="3")
    assert "train_rm.py" not in called and "train_sft.py" not in called
    args = parse_ppo(called["train_ppo.py"])
    assert (args.pretrain, args.rm_pretrain, args.num_episodes) == (sft, rm, 3)
    assert (
        args.ptx_coef > 0 and args.ptx_dataset and args.eval_prompt_dataset != args.prompt_dataset
    )
    assert optimizer_steps_per_pass(
        args.num_collect_steps,
        args.experience_batch_size,
        args.train_batch_size,
        args.accumulation_steps,
    )
    compared = parse_compare(called["compare.py"])
    assert (compared.model_path, compared.start_path, compared.rm_path) == (
        f"{args.save_dir}/actor/modeling",
        sft,
        rm,
    )
    assert compared.temperature == args.temperature and compared.max_new_tokens == args.max_seq_len


def test_a_reward_model_is_made_where_there_is_none(tmp_path):
    (tmp_path / "sft").mkdir()
    called = called_by("demo_rlhf.sh", tmp_path, SFT=str(tmp_path / "sft"), RM=str(tmp_path / "no"))
    reward_model, policy = parse_rm(called["train_rm.py"]), parse_ppo(called["train_ppo.py"])
    assert (
        policy.rm_pretrain == f"{reward_model.save_dir}/modeling" == f"{tmp_path}/demo/rm/modeling"
    )


def test_the_prompts_of_the_comparison_were_not_trained_on():
    assert not messages("preference_test.jsonl") & messages("preference.jsonl")
