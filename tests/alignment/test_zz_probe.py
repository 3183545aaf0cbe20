import pytest, json
from tests.alignment.test_ppo_run import *
from tests.alignment.test_ppo_run import sampling_run
@pytest.mark.parametrize("T",[1.0,3.0])
@pytest.mark.parametrize("lr",[3e-3,1e-2])
@pytest.mark.parametrize("kind",["grpo","ppo","online_dpo"])
def test_probe(T,lr,kind,sampling_run):
    s={**sampling_run,**LEARNERS[kind],"rollout":{**sampling_run["rollout"],"temperature":T}}
    folder=run(s,steps=25,optim={"lr":lr,"schedule":"constant"},judges=[])
    L=[l for l in read_metrics(folder) if l["step"]]
    with open("/tmp/scratch/probe.txt","a") as f:
        f.write(f"{kind} T{T} lr{lr} "+" ".join(f"{l['reward']:.2f}" for l in L[::3])+"  ent "+" ".join(f"{l.get('entropy',0):.2f}" for l in L[::6])+" kl "+" ".join(f"{l.get('kl',0):.2f}" for l in L[::6])+"\n")
