import collections

from entangle.data import embedded_corpus, generate_tweets


def test_same_seed_same_tweets_and_fewer_are_the_first_of_more():
    assert generate_tweets(50, seed=7) == generate_tweets(200, seed=7)[:50]
    assert generate_tweets(50, seed=7) != generate_tweets(50, seed=8)


def test_tweets_do_not_depend_on_the_process():
    # written down once; a change of the grammar changes the embedded data set and belongs in the changelog
    assert generate_tweets(1, seed=0)[0].text == "I recommend my homework!! #school"


def test_no_tweet_occurs_twice_across_the_parts_of_the_embedded_corpus():
    corpus = embedded_corpus(train=1000, held_out=300, text=500, seed=1)
    texts = [tweet.text for tweet in corpus.train + corpus.held_out] + corpus.text
    assert len(texts) == len(set(texts)) == 1800
    bare = [text.split(" Sentiment: ")[0] for text in texts]  # half of the text says the label: of other tweets only
    assert len(set(bare)) == 1800
    assert sum(map(str.__ne__, bare, texts)) == 250


def test_labels_are_balanced_and_named_as_asked():
    counts = collections.Counter(tweet.label for tweet in generate_tweets(4000, 0, labels=("bad", "good")))
    assert set(counts) == {"bad", "good"}
    # a fair coin's count has standard deviation sqrt(4000)/2 = 32; 5 of them are 158
    assert abs(counts["bad"] - 2000) < 158


def test_sentiment_is_learnable_but_no_single_word_settles_it():
    train, held_out = generate_tweets(3000, seed=0)[:2500], generate_tweets(3000, seed=0)[2500:]
    words = collections.defaultdict(lambda: [1.0, 1.0])  # add-one smoothed counts per label
    for tweet in train:
        for word in set(tweet.text.lower().split()):
            words[word][tweet.label == "positive"] += 1
    naive_bayes = [_score(tweet.text, words) > 1 for tweet in held_out]
    accuracy = sum(guess == (t.label == "positive") for guess, t in zip(naive_bayes, held_out, strict=True)) / 500
    # chance is .5; word order is ignored, so negation and contrast stay unseen, and a tenth is a coin flip (.95 at best)
    assert 0.65 < accuracy < 0.9


def test_slots_are_all_filled_and_articles_agree():
    for tweet in generate_tweets(2000, seed=3):
        assert "{" not in tweet.text and "}" not in tweet.text
        assert " a a" not in tweet.text.lower() and " a u" not in tweet.text.lower()


def _score(text: str, words: dict[str, list[float]]) -> float:
    odds = 1.0
    for word in set(text.lower().split()):
        odds *= words[word][1] / words[word][0] if word in words else 1.0
    return odds
