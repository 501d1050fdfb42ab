//! Label selectors.
//!
//! Keys and values are checked as API servers check them: one with a typing error would be a label that no object has, so that
//! `NotIn` selects too many, and a policy applies to too few.

use std::collections::BTreeSet;

use super::place::{Fault, Spot};
use crate::selector::{LabelSelector, Operator, Requirement};

/// Longest name in a label's key, and longest value (Kubernetes, "Labels and Selectors").
const LONGEST_NAME: usize = 63;

/// Longest prefix of a label's key.
const LONGEST_PREFIX: usize = 253;

/// Reads a selector.
pub(super) fn selector(spot: &Spot<'_>) -> Result<LabelSelector, Fault> {
    let fields = spot.map_of(&["matchLabels", "matchExpressions"])?;
    let mut requirements = BTreeSet::new();
    if let Some(labels) = fields.get("matchLabels") {
        for (key, value) in labels.map()?.entries() {
            check_key(key, &value)?;
            requirements.insert(Requirement { key: key.to_owned(), operator: Operator::In([label(&value)?].into()) });
        }
    }
    if let Some(expressions) = fields.get("matchExpressions") {
        for expression in expressions.items()? {
            requirements.insert(requirement(&expression)?);
        }
    }
    Ok(LabelSelector { requirements })
}

fn requirement(spot: &Spot<'_>) -> Result<Requirement, Fault> {
    let fields = spot.map_of(&["key", "operator", "values"])?;
    let key = fields.required("key")?;
    check_key(key.text()?, &key)?;
    let mut values = BTreeSet::new();
    let given = fields.get("values");
    if let Some(given) = &given {
        for value in given.items()? {
            values.insert(label(&value)?);
        }
    }
    let operator = fields.required("operator")?;
    let operator = match (operator.text()?, values.is_empty()) {
        ("In", false) => Operator::In(values),
        ("NotIn", false) => Operator::NotIn(values),
        ("Exists", true) => Operator::Exists,
        ("DoesNotExist", true) => Operator::DoesNotExist,
        ("In" | "NotIn", true) => return Err(operator.fault("this operator needs values", "write values")),
        ("Exists" | "DoesNotExist", false) => {
            return Err(operator.fault("this operator takes no values", "remove the values, or write In or NotIn"));
        }
        _ => {
            let reason = "an operator is one of In, NotIn, Exists, DoesNotExist";
            return Err(operator.fault(reason, "write one of them"));
        }
    };
    Ok(Requirement { key: key.text()?.to_owned(), operator })
}

fn label(spot: &Spot<'_>) -> Result<String, Fault> {
    let value = spot.text()?;
    if value.is_empty() || is_name(value) {
        return Ok(value.to_owned());
    }
    let reason =
        "no label has such a value: up to 63 letters, digits, '-', '_' and '.', the first and the last letter or digit";
    Err(spot.fault(reason, "write the value of a label"))
}

fn check_key(key: &str, spot: &Spot<'_>) -> Result<(), Fault> {
    let (prefix, name) = key.split_once('/').map_or((None, key), |(prefix, name)| (Some(prefix), name));
    if is_name(name) && prefix.is_none_or(is_domain) {
        return Ok(());
    }
    let reason = format!(
        "{key:?} is the key of no label: up to 63 letters, digits, '-', '_' and '.', or a domain, '/' and these"
    );
    Err(spot.fault(reason, "write the key of a label"))
}

fn is_name(text: &str) -> bool {
    let ends = [text.bytes().next(), text.bytes().last()];
    let between = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let at_ends = |byte: Option<u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric());
    text.len() <= LONGEST_NAME && ends.into_iter().all(at_ends) && text.bytes().all(between)
}

/// RFC 1123 subdomain.
fn is_domain(text: &str) -> bool {
    let lower = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let part = |part: &str| {
        let ends = [part.bytes().next(), part.bytes().last()];
        ends.into_iter().all(|byte| byte.is_some_and(lower)) && part.bytes().all(|byte| lower(byte) || byte == b'-')
    };
    text.len() <= LONGEST_PREFIX && text.split('.').all(part)
}
