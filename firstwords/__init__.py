"""firstwords: a GPT-2 style chatbot from random weights, on the Hugging Face Trainer.

The package in floors; a module imports only from lower ones, and modules of a floor do not know one
another. `errors` and `atomic` stand below all of them, `args` beside. Floors 0 to 2 need no torch.

    0  schema       CONTRACT: the conversation row
    0  hashes       contents -> 8-byte hashes, sorted on disk: copies, the split
    0  near         texts -> how many are nearly one of others
    0  tokenstore   CONTRACT: the token store of stage A
    0  signals      a signal or the file STOP -> a wish to stop
    0  hub          a model's name on the Hub -> its files in the cache
    0  parts        units of work -> parts on disk, in processes, gone on with after a kill
    1  ranks        the processes of a run -> one of them is first, and all have the same end
    1  pages        texts and numbers -> the parts of HTML and Markdown
    1  pydocs       the embedded corpus: the documentation of the installed Python
    1  tokenizer    GPT-2's BPE, own BPE, characters; control tokens
    1  sources      rows of any known shape -> conversations; texts -> documents
    1  packing      lengths -> fixed rows
    1  prep         what both prep scripts share: flags, rejected rows, finished folders
    2  template     CONTRACT: conversation -> ids and mask
    2  plot         series of numbers -> charts as SVG
    2  corpus       documents -> encoded parts -> the token store
    3  show         prepared conversations -> what a person sees of them
    3  conversations  rows -> conversations and their tokens, in parts
    3  cluster      slices of files -> parts, as a step of datatrove on any machines
    3  model        configuration -> GPT2LMHeadModel, packed attention, loss
    3  optimizer    Muon and AdamW as one
    3  recompute    a model -> one that keeps less for its backward pass
    4  dataset      prepared data -> rows of tensors
    4  memory       a shape and a batch -> the bytes that training takes
    4  checkpoint   CONTRACT: the checkpoint folder and the run folder
    4  generate     prompt ids -> reply ids
    5  fit          a limit of memory -> micro-batch, accumulation and recomputation
    5  pace         steps, hours or a cooldown -> the last step, and the rate on the way
    5  wishes       what a machine may not be able to do -> a refusal that says what to install
    5  session      ChatSession: text in, text out
    5  llamacpp     model -> GGUF, and Ollama's Modelfile
    5  card         what files say of a model -> its model card
    5  quantize     matrices in fewer bytes, and what that costs
    5  loss         model and rows of tokens -> the loss by tokens
    5  history      a run folder -> all that its files tell
    5  baselines    prepared data -> what counting alone would score
    6  log          what a run says -> train.log, TensorBoard, the screen
    6  score        questions with known answers -> marks
    6  server       a model -> an API that speaks OpenAI's words, and a page to chat on
    6  repl         lines of a chat: questions and commands
    6  health       fixed prompts -> whether replies end, repeat, keep their role
    6  samples      a prompt -> what is said; the file in which one watches it learn
    6  figures      a run folder -> its sentence, its figures, its warnings
    6  tasks        the tests that papers report -> scores
    7  terminal     the prompt of a chat on a terminal
    7  trainer      the Trainer subclass and its callbacks
    7  evaluation   a checkpoint and data -> loss, baselines, marks, health
    7  report       a run folder -> report.html, report.md
    7  compare      two run folders -> what differs, and what came of it
    7  monitor      a run in progress -> rates, samples, health, tests
    8  opening      flags -> tokenizer, model and data of a run, open and checked
    9  preflight    a run that is to begin -> what it will take, refused now if that is not there
    9  explain      the flags of a run -> each in plain words
    9  resume       a used run folder -> the checkpoint to go on from, or why this is another run
    9  callbacks    the flags of a run -> all that watches over it
"""
