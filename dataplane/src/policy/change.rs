//! Changes to the table, as people see them and as they alter what is known of the kernel.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use husk_overlay::kernel::CounterName;
use husk_overlay::kernel::policy::{PolicyChain, PolicyElement, PolicyName, PolicySet, PolicyTable, PolicyValue};
use serde::ser::SerializeMap as _;
use serde::{Serialize, Serializer};

use super::{ActualChain, ActualHook, ActualPolicy, ActualSet, ForeignObject, object};

/// Elements with their values.
pub(super) type Elements = BTreeMap<PolicyElement, PolicyValue>;

/// One change to the table `inet husk-policy`. All changes of a pass come into force at one moment.
#[derive(Debug, Clone, PartialEq)]
pub enum PolicyChange {
    /// The table is missing.
    CreateTable {
        /// All of it.
        table: PolicyTable,
    },
    /// The table as a whole is not as it should be; deleted and created at once.
    ReplaceTable {
        /// All of it.
        table: PolicyTable,
        /// What is wrong with the present one.
        reason: String,
    },
    /// There shall be no table.
    DeleteTable,
    /// A counter is missing.
    AddCounter {
        /// Its name.
        name: CounterName,
    },
    /// A counter is not desired.
    DeleteCounter {
        /// Its name.
        name: CounterName,
    },
    /// A set is missing.
    AddSet {
        /// Its name.
        name: PolicyName,
        /// The set with its elements.
        set: Arc<PolicySet>,
    },
    /// A set has another type or other flags. The chains that refer to it are rebuilt in the same transaction.
    ReplaceSet {
        /// Its name.
        name: PolicyName,
        /// The set with its elements.
        set: Arc<PolicySet>,
    },
    /// A set has elements of forms that Husk never makes; it is emptied and filled.
    RefillSet {
        /// Its name.
        name: PolicyName,
        /// The set with its elements.
        set: Arc<PolicySet>,
    },
    /// Elements are missing.
    AddElements {
        /// Name of the set.
        name: PolicyName,
        /// What to add.
        elements: BTreeMap<PolicyElement, PolicyValue>,
        /// The set as it is after all changes to it.
        set: Arc<PolicySet>,
    },
    /// Elements are too many, or have other values.
    DeleteElements {
        /// Name of the set.
        name: PolicyName,
        /// What to delete.
        elements: BTreeMap<PolicyElement, PolicyValue>,
        /// The set as it is after all changes to it.
        set: Arc<PolicySet>,
    },
    /// A set is not desired.
    DeleteSet {
        /// Its name.
        name: PolicyName,
    },
    /// A chain is missing.
    AddChain {
        /// Its name.
        name: PolicyName,
        /// The chain with its rules.
        chain: Arc<PolicyChain>,
    },
    /// A chain has another hook, priority, type or policy, none of which can be changed in place.
    ReplaceChain {
        /// Its name.
        name: PolicyName,
        /// The chain with its rules.
        chain: Arc<PolicyChain>,
        /// What it is at present.
        actual: ActualHook,
    },
    /// The rules of a chain are not the desired ones in the desired order.
    RebuildChain {
        /// Its name.
        name: PolicyName,
        /// The chain with its rules.
        chain: Arc<PolicyChain>,
        /// What differs, for people.
        reason: String,
    },
    /// A chain is not desired.
    DeleteChain {
        /// Its name.
        name: PolicyName,
    },
    /// An object of a kind that Husk never makes.
    DeleteForeign {
        /// Kind and name.
        object: ForeignObject,
    },
}

impl PolicyChange {
    /// Makes the change to what is known of a kernel.
    pub(crate) fn apply_to(&self, state: &mut Option<Arc<ActualPolicy>>) {
        match (self, state) {
            (Self::CreateTable { table } | Self::ReplaceTable { table, .. }, state) => {
                *state = Some(Arc::new(ActualPolicy::of(table)));
            }
            (Self::DeleteTable, state) => *state = None,
            (other, Some(state)) => other.edit(Arc::make_mut(state)),
            (_, None) => {}
        }
    }

    fn edit(&self, state: &mut ActualPolicy) {
        match self {
            Self::CreateTable { .. } | Self::ReplaceTable { .. } | Self::DeleteTable => {}
            Self::AddCounter { name } => {
                state.counters.insert(name.clone());
            }
            Self::DeleteCounter { name } => {
                state.counters.remove(name);
            }
            Self::AddSet { name, set }
            | Self::ReplaceSet { name, set }
            | Self::RefillSet { name, set }
            | Self::AddElements { name, set, .. }
            | Self::DeleteElements { name, set, .. } => {
                state.sets.insert(name.clone(), ActualSet::Ours(set.clone()));
            }
            Self::DeleteSet { name } => {
                state.sets.remove(name);
            }
            Self::AddChain { name, chain }
            | Self::ReplaceChain { name, chain, .. }
            | Self::RebuildChain { name, chain, .. } => {
                state.chains.insert(name.clone(), ActualChain::of(chain));
            }
            Self::DeleteChain { name } => {
                state.chains.remove(name);
            }
            Self::DeleteForeign { object } => {
                state.foreign.remove(object);
            }
        }
    }

    /// Kind of the change, as a program reads it.
    fn kind(&self) -> &'static str {
        match self {
            Self::CreateTable { .. } => "createTable",
            Self::ReplaceTable { .. } => "replaceTable",
            Self::DeleteTable => "deleteTable",
            Self::AddCounter { .. } => "addCounter",
            Self::DeleteCounter { .. } => "deleteCounter",
            Self::AddSet { .. } => "addSet",
            Self::ReplaceSet { .. } => "replaceSet",
            Self::RefillSet { .. } => "refillSet",
            Self::AddElements { .. } => "addElements",
            Self::DeleteElements { .. } => "deleteElements",
            Self::DeleteSet { .. } => "deleteSet",
            Self::AddChain { .. } => "addChain",
            Self::ReplaceChain { .. } => "replaceChain",
            Self::RebuildChain { .. } => "rebuildChain",
            Self::DeleteChain { .. } => "deleteChain",
            Self::DeleteForeign { .. } => "deleteForeign",
        }
    }

    /// Name of what is changed within the table.
    fn name(&self) -> Option<&str> {
        match self {
            Self::CreateTable { .. } | Self::ReplaceTable { .. } | Self::DeleteTable => None,
            Self::AddCounter { name } | Self::DeleteCounter { name } => Some(name),
            Self::AddSet { name, .. }
            | Self::ReplaceSet { name, .. }
            | Self::RefillSet { name, .. }
            | Self::AddElements { name, .. }
            | Self::DeleteElements { name, .. }
            | Self::DeleteSet { name }
            | Self::AddChain { name, .. }
            | Self::ReplaceChain { name, .. }
            | Self::RebuildChain { name, .. }
            | Self::DeleteChain { name } => Some(name),
            Self::DeleteForeign { object: ForeignObject::Stateful(_, name) | ForeignObject::Flowtable(name) } => {
                Some(name)
            }
        }
    }

    /// Elements that come or go.
    fn elements(&self) -> Option<&Elements> {
        match self {
            Self::AddSet { set, .. } | Self::ReplaceSet { set, .. } | Self::RefillSet { set, .. } => {
                Some(&set.elements)
            }
            Self::AddElements { elements, .. } | Self::DeleteElements { elements, .. } => Some(elements),
            _ => None,
        }
    }
}

/// The kind, the name and the elements, and the whole as people read it.
impl Serialize for PolicyChange {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("change", self.kind())?;
        if let Some(name) = self.name() {
            map.serialize_entry("name", name)?;
        }
        if let Some(elements) = self.elements() {
            let texts: Vec<String> = elements.iter().map(|(element, value)| format!("{element}{value}")).collect();
            map.serialize_entry("elements", &texts)?;
        }
        map.serialize_entry("text", &self.to_string())?;
        map.end()
    }
}

impl fmt::Display for PolicyChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", object())?;
        match self {
            Self::CreateTable { table } => {
                let elements: usize = table.sets.values().map(|set| set.elements.len()).sum();
                let (chains, sets) = (table.chains.len(), table.sets.len());
                write!(f, "create with {chains} chains, {sets} sets with {elements} elements")
            }
            Self::ReplaceTable { reason, .. } => write!(f, "replace, because {reason}"),
            Self::DeleteTable => f.write_str("delete"),
            Self::AddCounter { name } => write!(f, "add counter {name}"),
            Self::DeleteCounter { name } => write!(f, "delete counter {name}"),
            Self::AddSet { name, set } => write!(f, "add set {name} with {}", List(&set.elements)),
            Self::ReplaceSet { name, set } => {
                write!(f, "replace set {name} (of another type) with {}", List(&set.elements))
            }
            Self::RefillSet { name, set } => {
                write!(
                    f,
                    "refill set {name} (it has elements of a form Husk does not use) with {}",
                    List(&set.elements)
                )
            }
            Self::AddElements { name, elements, .. } => write!(f, "set {name}: add {}", List(elements)),
            Self::DeleteElements { name, elements, .. } => write!(f, "set {name}: delete {}", List(elements)),
            Self::DeleteSet { name } => write!(f, "delete unwanted set {name}"),
            Self::AddChain { name, chain } => write!(f, "add chain {name} with {} rules", chain.rules.len()),
            Self::ReplaceChain { name, chain, actual } => {
                write!(f, "replace chain {name} ({actual}) by one {}", ActualHook::of(chain))
            }
            Self::RebuildChain { name, chain, reason } => {
                write!(f, "rebuild chain {name} with {} rules ({reason})", chain.rules.len())
            }
            Self::DeleteChain { name } => write!(f, "delete unwanted chain {name}"),
            Self::DeleteForeign { object: ForeignObject::Stateful(kind, name) } => {
                write!(f, "delete unwanted object {name} of type {kind}")
            }
            Self::DeleteForeign { object: ForeignObject::Flowtable(name) } => {
                write!(f, "delete unwanted flow table {name}")
            }
        }
    }
}

impl fmt::Display for ActualHook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("without a hook"),
            Self::Base(hook, priority) => write!(f, "of hook {hook:?} and priority {priority}"),
            Self::Foreign => f.write_str("of a form Husk does not use"),
        }
    }
}

/// Up to three elements by name, more by number.
struct List<'a>(&'a Elements);

impl fmt::Display for List<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() || self.0.len() > 3 {
            return write!(f, "{} elements", self.0.len());
        }
        for (index, element) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{}{}", element.0, element.1)?;
        }
        Ok(())
    }
}
