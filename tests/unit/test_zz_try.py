def test_a(compress, models, texts):
    import time
    for kind in ("gpt2","bert","llama"):
        t=time.time()
        r = compress("run","--model",models[kind],"--data",texts,"--samples",0,"--eval-samples",0,"--repeats",1,"--prompt-length",8,"--new-tokens",4,"--random-seeds",2)
        print(kind, r.code, time.time()-t); print(r.err[-600:]); print(r.out[-300:])
    t=time.time(); r = compress("score","--model",models["gpt2"],"--data",texts,"--json"); print(time.time()-t, r.out[:1500]); 
    t=time.time(); r = compress("prune","--json","--export"); print(time.time()-t, r.out[:1500],r.err); 
