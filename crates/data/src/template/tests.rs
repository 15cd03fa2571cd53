//! Renderings of the templates that people use, with the trained spans in brackets.

use super::*;
use crate::forms::Message;

pub(crate) const LLAMA_3: &str = "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = \
    '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}\
    {% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}";

pub(crate) const MISTRAL: &str = "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != \
    (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') \
    }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
    {% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% else %}\
    {{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}";

fn specials(tokens: &[&str], named: &[(&str, &str)]) -> Specials {
    Specials {
        special: tokens.iter().map(|token| (*token).to_owned()).collect(),
        named: named.iter().map(|(name, token)| ((*name).to_owned(), (*token).to_owned())).collect(),
    }
}

fn chatml_specials() -> Specials {
    specials(&["<|endoftext|>", "<|im_start|>", "<|im_end|>"], &[("eos_token", "<|endoftext|>")])
}

fn conversation(turns: &[(&str, &str)]) -> Conversation {
    Conversation { messages: turns.iter().map(|(role, content)| Message::new(*role, *content)).collect() }
}

const TWO_TURNS: [(&str, &str); 5] =
    [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye"), ("assistant", " See you\n")];

/// The text with each span in ⟦ ⟧.
fn show(rendered: &Rendered) -> String {
    let mut text = String::new();
    let mut at = 0;
    for span in &rendered.spans {
        text += &rendered.text[at..span.start];
        text += "⟦";
        text += &rendered.text[span.clone()];
        text += "⟧";
        at = span.end;
    }
    text + &rendered.text[at..]
}

fn render(source: &str, specials: &Specials, turns: &[(&str, &str)]) -> String {
    let template = ChatTemplate::compile("t.jinja", source, specials).unwrap();
    match template.render_training(&conversation(turns)) {
        Ok(rendered) => show(&rendered),
        Err(fault) => fault.message,
    }
}

#[test]
fn chatml_keeps_white_space_and_trains_the_end_of_the_turn() {
    let template = ChatTemplate::built_in("chatml", &chatml_specials()).unwrap();
    insta::assert_snapshot!(show(&template.render_training(&conversation(&TWO_TURNS)).unwrap()), @r"
    <|im_start|>system
    Be kind.<|im_end|>
    <|im_start|>user
    Hi<|im_end|>
    <|im_start|>assistant
    ⟦Hello!<|im_end|>⟧
    <|im_start|>user
    Bye<|im_end|>
    <|im_start|>assistant
    ⟦ See you
    <|im_end|>⟧
    ");
    assert_eq!(template.end_of_turn().as_deref(), Some("<|im_end|>"));
    let prompt = template.prompt(&[Message::new("user", "Hi")]).unwrap();
    assert_eq!(prompt, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
}

#[test]
fn llama_3_trims_and_the_spans_follow() {
    let specials = specials(
        &["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        &[("bos_token", "<|begin_of_text|>"), ("eos_token", "<|end_of_text|>")],
    );
    insta::assert_snapshot!(render(LLAMA_3, &specials, &TWO_TURNS), @r"
    <|begin_of_text|><|start_header_id|>system<|end_header_id|>

    Be kind.<|eot_id|><|start_header_id|>user<|end_header_id|>

    Hi<|eot_id|><|start_header_id|>assistant<|end_header_id|>

    ⟦Hello!<|eot_id|>⟧<|start_header_id|>user<|end_header_id|>

    Bye<|eot_id|><|start_header_id|>assistant<|end_header_id|>

    ⟦See you<|eot_id|>⟧
    ");
    // White space at the start that the template takes away is not looked for in the header before it.
    let turns = [("user", "Hi"), ("assistant", "\nHello")];
    assert!(render(LLAMA_3, &specials, &turns).ends_with("<|end_header_id|>\n\n⟦Hello<|eot_id|>⟧"));
}

#[test]
fn mistral_trains_the_end_of_text_and_refuses_in_its_own_words() {
    let specials = specials(&["<s>", "</s>"], &[("bos_token", "<s>"), ("eos_token", "</s>")]);
    insta::assert_snapshot!(render(MISTRAL, &specials, &TWO_TURNS[1..]), @r"
    <s>[INST] Hi [/INST]⟦Hello!</s>⟧[INST] Bye [/INST]⟦ See you
    </s>⟧
    ");
    insta::assert_snapshot!(render(MISTRAL, &specials, &TWO_TURNS), @"chat template of t.jinja: line 1: the template says: Conversation roles must alternate user/assistant/user/assistant/...");
}

#[test]
fn generation_blocks_are_believed_and_lengthened_to_the_end_of_the_turn() {
    let source = "{% for m in messages %}\n{%- if m.role == 'assistant' -%}\n<a>{% generation %}{{ m.content | trim }}\
        {% endgeneration %}<|im_end|>\n{%- else -%}\n<u>{{ m.content }}<|im_end|>\n{%- endif -%}\n{% endfor %}";
    let found = render(source, &chatml_specials(), &TWO_TURNS);
    assert_eq!(
        found,
        "<u>Be kind.<|im_end|><u>Hi<|im_end|><a>⟦Hello!<|im_end|>⟧<u>Bye<|im_end|><a>⟦See you<|im_end|>⟧"
    );
    let inside = source.replace("{% endgeneration %}<|im_end|>", "<|im_end|>{% endgeneration %}");
    assert_eq!(render(&inside, &chatml_specials(), &TWO_TURNS), found);
    let open = source.replace("{% endgeneration %}", "");
    insta::assert_snapshot!(render(&open, &chatml_specials(), &TWO_TURNS), @"chat template of t.jinja: its {% generation %} blocks are not closed in order");
}

#[test]
fn a_turn_without_an_end_gets_the_end_of_text() {
    let source = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}";
    insta::assert_snapshot!(render(source, &chatml_specials(), &TWO_TURNS[1..3]), @r"
    ### user:
    Hi

    ### assistant:
    ⟦Hello!<|endoftext|>⟧
    ");
    let none = specials(&[], &[]);
    insta::assert_snapshot!(render(source, &none, &TWO_TURNS[1..3]), @"chat template of t.jinja: it writes no end of the turn, and the tokenizer names no `eos_token`");
}

#[test]
fn a_template_that_cuts_the_answer_up_is_refused() {
    for source in [
        "{% for m in messages %}{{ m.content.split('l')[0] }}<|im_end|>{% endfor %}",
        "{% for m in messages %}{{ m.content | length }}<|im_end|>{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}<|im_end|>{% endfor %}",
        "{% for m in messages %}{% if m.content.startswith('Hel') %}a{% endif %}{{ m.content }}<|im_end|>{% endfor %}",
        "{{ messages[0].content }}<|im_end|>",
    ] {
        let words = render(source, &chatml_specials(), &TWO_TURNS[1..3]);
        assert!(words.contains("it does not write the assistant's text as it stands"), "{source}: {words}");
    }
}

#[test]
fn text_that_looks_like_a_header_stays_the_assistants_own() {
    let turns = [("user", "x"), ("assistant", "<|im_start|>assistant\nno"), ("user", "\u{F0000}"), ("assistant", "y")];
    let template = ChatTemplate::built_in("chatml", &chatml_specials()).unwrap();
    let rendered = template.render_training(&conversation(&turns)).unwrap();
    let texts: Vec<&str> = rendered.spans.iter().map(|span| &rendered.text[span.clone()]).collect();
    assert_eq!(texts, ["<|im_start|>assistant\nno<|im_end|>", "y<|im_end|>"]);
}

#[test]
fn a_turn_can_be_left_out_of_the_loss() {
    let mut conversation = conversation(&TWO_TURNS);
    conversation.messages[2].trained = false;
    let template = ChatTemplate::built_in("chatml", &chatml_specials()).unwrap();
    let rendered = template.render_training(&conversation).unwrap();
    assert_eq!(rendered.spans.len(), 1);
    assert_eq!(&rendered.text[rendered.spans[0].clone()], " See you\n<|im_end|>");
}

#[test]
fn faults_of_the_template_are_said_with_its_place() {
    let error = |source: &str| ChatTemplate::compile("t.jinja", source, &chatml_specials()).unwrap_err().to_string();
    insta::assert_snapshot!(error("a\n{% for %}"), @"chat template of t.jinja: line 2: unexpected end of block, expected in");
    let error = |name: &str, specials: &Specials| ChatTemplate::built_in(name, specials).unwrap_err().to_string();
    insta::assert_snapshot!(error("chat-ml", &chatml_specials()), @r#"chat template of "chat-ml": there is no such built-in template; expected chatml; did you mean "chatml"?"#);
    insta::assert_snapshot!(error("chatml", &specials(&[], &[])), @r#"chat template of "chatml": needs the token "<|im_start|>", which the tokenizer does not have"#);
}
