//! Takes secrets out of what is to be given away, by what they stand under and by what they look like.

use serde_json::Value;
use zeroize::Zeroizing;

/// What stands in a secret's place.
pub(super) const REDACTED: &str = "<redacted>";

/// A key whose name has one of these in it, whatever its case and punctuation, has a secret under it.
const SECRET_NAMES: [&str; 15] = [
    "apikey",
    "authorization",
    "bearer",
    "clientkey",
    "credential",
    "keydata",
    "passphrase",
    "passwd",
    "password",
    "presharedkey",
    "privatekey",
    "psk",
    "secret",
    "token",
    "sharedkey",
];

/// A name that ends like this says where a secret is, not what it is.
const WHEREABOUTS: [&str; 4] = ["file", "path", "name", "ref"];

/// Least digits of a number in hexadecimal that may be a key: 128 bits.
const KEY_DIGITS: usize = 32;

/// A text without its secrets, and these.
pub(super) struct Redacted {
    pub(super) text: String,
    pub(super) secrets: Vec<Zeroizing<String>>,
}

/// YAML or JSON documents without what stands under names of secrets, in Kubernetes Secrets, in the arguments of programs that
/// fetch credentials, and between `//` and `@` of addresses. Comments and order get lost on the way.
///
/// # Errors
/// When the text is neither: what cannot be read cannot be trusted. The reason repeats nothing of it.
pub(super) fn structured(text: &str) -> Result<Redacted, String> {
    let options = serde_saphyr::options! { with_snippet: false };
    let documents: Vec<Value> = serde_saphyr::from_multiple_with_options(text, options)
        .map_err(|_| "it is neither YAML nor JSON, so that nobody knows where secrets are in it".to_owned())?;
    let mut secrets = Vec::new();
    let mut texts = Vec::new();
    for mut document in documents {
        walk(&mut document, &mut secrets);
        texts.push(serde_saphyr::to_string(&document).map_err(|_| "it has no YAML form".to_owned())?);
    }
    Ok(Redacted { text: texts.join("---\n"), secrets })
}

fn walk(value: &mut Value, secrets: &mut Vec<Zeroizing<String>>) {
    match value {
        Value::Object(map) => {
            let is_secret = map.get("kind").and_then(Value::as_str) == Some("Secret");
            for (name, below) in map {
                let whole = is_secret && ["data", "stringData"].contains(&name.as_str());
                if name == "exec" {
                    hide_arguments(below, secrets);
                }
                if whole || names_a_secret(name) { hide(below, secrets) } else { walk(below, secrets) }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| walk(item, secrets)),
        Value::String(text) if looks_like_a_token(text) => hide(value, secrets),
        Value::String(text) => {
            if let Some((before, secret, after)) = user_information(text) {
                secrets.push(Zeroizing::new(secret.to_owned()));
                *text = format!("{before}{REDACTED}{after}");
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// The arguments and the environment of a program that fetches credentials may have some in them.
fn hide_arguments(value: &mut Value, secrets: &mut Vec<Zeroizing<String>>) {
    for name in ["args", "env"] {
        if let Some(below) = value.get_mut(name) {
            hide(below, secrets);
        }
    }
}

/// Replaces every text below a value.
fn hide(value: &mut Value, secrets: &mut Vec<Zeroizing<String>>) {
    match value {
        Value::Object(map) => map.values_mut().for_each(|below| hide(below, secrets)),
        Value::Array(items) => items.iter_mut().for_each(|item| hide(item, secrets)),
        Value::String(text) => {
            secrets.push(Zeroizing::new(std::mem::replace(text, REDACTED.to_owned())));
        }
        Value::Number(_) => *value = REDACTED.into(),
        Value::Null | Value::Bool(_) => {}
    }
}

fn names_a_secret(name: &str) -> bool {
    let plain: String = name.chars().filter(char::is_ascii_alphanumeric).map(|it| it.to_ascii_lowercase()).collect();
    SECRET_NAMES.iter().any(|part| plain.contains(part)) && !WHEREABOUTS.iter().any(|end| plain.ends_with(end))
}

/// A JSON Web Token: three parts of base64, the first of which is an object (RFC 7519).
fn looks_like_a_token(text: &str) -> bool {
    text.starts_with("eyJ") && text.bytes().filter(|byte| *byte == b'.').count() == 2 && !text.contains(' ')
}

/// What is before, is, and is after the user and password of an address (RFC 3986, section 3.2.1).
fn user_information(text: &str) -> Option<(&str, &str, &str)> {
    let start = text.find("://")? + 3;
    let authority = text[start..].split(['/', '?', '#', ' ']).next()?;
    let end = start + authority.rfind('@')?;
    Some((&text[..start], &text[start..end], &text[end..]))
}

/// Replaces numbers in hexadecimal that are long enough to be keys: those that begin with `0x`, as in what `ip xfrm` prints.
pub(super) fn long_numbers(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("0x") {
        let digits = rest[at + 2..].bytes().take_while(u8::is_ascii_hexdigit).count();
        out += &rest[..at];
        if digits >= KEY_DIGITS {
            out += REDACTED;
        } else {
            out += &rest[at..at + 2 + digits];
        }
        rest = &rest[at + 2 + digits..];
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn redacted(text: &str) -> (String, Vec<String>) {
        let Redacted { text, secrets } = structured(text).unwrap();
        (text, secrets.iter().map(|secret| secret.to_string()).collect())
    }

    #[test]
    fn a_kubeconfig_keeps_its_form_and_loses_its_secrets() {
        let config = r#"
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://user:hunter2hunter2@10.0.0.1:6443/x", certificate-authority-data: Q0E=}}]
users:
- name: u
  user:
    token: |
      a-bearer-token-of-many-bytes
    client-key-data: cHJpdmF0ZSBrZXk=
    clientKeyFile: /etc/key.pem
    password: 12345678
    exec: {command: aws, args: [--secret-access, verysecretargument], env: [{name: X, value: inenvironment}]}
"#;
        let (text, secrets) = redacted(config);
        for secret in ["a-bearer-token-of-many-bytes\n", "cHJpdmF0ZSBrZXk=", "verysecretargument", "inenvironment"] {
            assert!(secrets.contains(&secret.to_owned()), "{secrets:?}");
            assert!(!text.contains(secret.trim()), "{text}");
        }
        assert!(!text.contains("12345678") && !text.contains("hunter2"), "{text}");
        assert!(secrets.contains(&"user:hunter2hunter2".to_owned()));
        for kept in ["Q0E=", "/etc/key.pem", "https://<redacted>@10.0.0.1:6443/x", "command: aws"] {
            assert!(text.contains(kept), "{kept}: {text}");
        }
    }

    #[test]
    fn a_configuration_of_husk_and_of_cni_is_whole() {
        let config = "mode: ipsec\nipsec: {presharedKeyFile: /etc/husk/psk}\nclusterCIDRs: [10.42.0.0/16]\n";
        let (text, secrets) = redacted(config);
        assert!(secrets.is_empty() && text.contains("presharedKeyFile: /etc/husk/psk"), "{text}");
        let (text, _) = redacted(
            r#"{"cniVersion": "1.0.0", "plugins": [{"type": "calico", "policy": {"k8s_auth_token": "abc"}}]}"#,
        );
        assert!(
            text.contains("k8s_auth_token: <redacted>") || text.contains("k8s_auth_token: \"<redacted>\""),
            "{text}"
        );
    }

    #[test]
    fn secrets_of_kubernetes_and_tokens_anywhere_are_taken_out() {
        let text = "kind: Secret\nmetadata: {name: s}\ndata: {harmless: dGhlIHZhbHVl}\n---\nkind: ConfigMap\ndata: {a: eyJh.eyJi.c, b: plain}\n";
        let (text, secrets) = redacted(text);
        assert_eq!(secrets, ["dGhlIHZhbHVl", "eyJh.eyJi.c"]);
        assert!(text.contains("name: s") && text.contains("plain") && text.contains("---\n"), "{text}");
    }

    #[test]
    fn what_cannot_be_read_is_not_given_away_and_not_repeated() {
        for text in ["token: [unclosed hunter2", "{\"a\": hunter2", "a: hunter2\n b: c\n- d"] {
            let reason = structured(text).err().unwrap();
            assert!(!reason.contains("hunter2"), "{reason}");
        }
    }

    #[test]
    fn long_numbers_are_keys_and_short_ones_are_not() {
        let line = "aead rfc4106(gcm(aes)) 0x00112233445566778899aabbccddeeff00112233 128";
        assert_eq!(long_numbers(line), "aead rfc4106(gcm(aes)) <redacted> 128");
        let plain = "proto esp spi 0xc0ffee00 reqid 1 mode tunnel mark 0xfe/0xff 0x";
        assert_eq!(long_numbers(plain), plain);
    }
}
