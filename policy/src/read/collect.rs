//! Putting objects together that come from several places.

use std::collections::BTreeMap;
use std::fmt::Display;

use husk_overlay::issue::{Issue, IssueKind, Severity};
use serde::Serialize;

use super::{Object, Reading, namespace};
use crate::object::Objects;
use crate::selector::Labels;

/// Puts readings together. Neither their order nor repetition makes a difference, nor how they were spread over files.
///
/// Where readings of one object differ, the one is used whose text sorts first, on every node the same, and an issue says so.
/// A namespace that has pods and is not described has the label with its name only.
#[must_use]
pub fn objects_from<'r>(readings: impl IntoIterator<Item = &'r Reading>) -> Objects {
    let (mut namespaces, mut pods, mut policies, mut cluster_policies) =
        (BTreeMap::new(), BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    let mut issues = Vec::new();
    for reading in readings {
        issues.extend(reading.issues.iter().cloned());
        match &reading.object {
            None => {}
            Some(Object::Namespace(name, labels)) => variants(&mut namespaces, name).push(labels),
            Some(Object::Pod(name, pod)) => variants(&mut pods, name).push(pod),
            Some(Object::NetworkPolicy(name, policy)) => variants(&mut policies, name).push(policy),
            Some(Object::ClusterNetworkPolicy(name, policy)) => variants(&mut cluster_policies, name).push(policy),
        }
    }
    let mut objects = Objects {
        namespaces: winners("Namespace", namespaces, &mut issues, text),
        pods: winners("Pod", pods, &mut issues, |pod| text(pod.as_ref())),
        network_policies: winners("NetworkPolicy", policies, &mut issues, |policy| text(policy.as_ref())),
        cluster_policies: winners("ClusterNetworkPolicy", cluster_policies, &mut issues, |policy| {
            text(policy.as_ref())
        }),
        issues: Vec::new(),
    };
    for name in objects.pods.keys() {
        if !objects.namespaces.contains_key(&name.namespace)
            && let Object::Namespace(name, labels) = namespace(&name.namespace, Labels::new())
        {
            objects.namespaces.insert(name, labels);
        }
    }
    issues.sort();
    issues.dedup();
    objects.issues = issues;
    objects
}

fn variants<'m, 'r, K: Ord, T>(all: &'m mut BTreeMap<&'r K, Vec<&'r T>>, name: &'r K) -> &'m mut Vec<&'r T> {
    all.entry(name).or_default()
}

/// A value without a text would sort first; there is none.
fn text(value: &impl Serialize) -> Option<String> {
    serde_json::to_string(value).ok()
}

/// Of each object the variant whose text sorts first.
fn winners<K: Clone + Ord + Display, T: Clone + PartialEq>(
    kind: &str,
    all: BTreeMap<&K, Vec<&T>>,
    issues: &mut Vec<Issue>,
    text: impl Fn(&T) -> Option<String>,
) -> BTreeMap<K, T> {
    let mut found = BTreeMap::new();
    for (name, mut variants) in all {
        variants.dedup();
        if variants.len() > 1 {
            variants.sort_by_cached_key(|variant| text(variant));
            variants.dedup();
        }
        if variants.len() > 1 {
            issues.push(Issue {
                severity: Severity::Error,
                kind: IssueKind::BadManifest,
                subject: format!("{kind} {name}"),
                message: format!("{} manifests of this object differ, and one of them is used", variants.len()),
                remedy: "find the manifests that name it and remove all but the right one".to_owned(),
            });
        }
        found.extend(variants.first().map(|winner| (name.clone(), (*winner).clone())));
    }
    found
}
