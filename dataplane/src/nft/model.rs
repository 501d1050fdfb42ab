//! What a change does to the table, without a kernel: for fakes, and to prove that [`super::diff()`] is complete.

use husk_overlay::kernel::NftTable;

use super::{ActualChain, NftChange, NftState, compile};

impl NftChange {
    /// Does to `state` what the kernel would do; none is a missing table. Changes of a missing table have no effect.
    pub fn apply_to(&self, state: &mut Option<NftState>) {
        match self {
            Self::CreateTable { table } | Self::ReplaceTable { table, .. } => *state = Some(NftState::of(table)),
            Self::DeleteTable => *state = None,
            change => {
                if let Some(state) = state {
                    state.apply(change);
                }
            }
        }
    }
}

impl NftState {
    fn apply(&mut self, change: &NftChange) {
        match change {
            NftChange::CreateTable { .. } | NftChange::ReplaceTable { .. } | NftChange::DeleteTable => {}
            NftChange::AddCounter { counter } => {
                self.counters.insert(counter.clone());
            }
            NftChange::AddSet { name, set } | NftChange::ReplaceSet { name, set } => {
                let table = NftTable { sets: [(name.clone(), set.clone())].into(), ..NftTable::default() };
                self.sets.extend(Self::of(&table).sets);
            }
            NftChange::AddElements { set, elements } => {
                if let Some(set) = self.sets.get_mut(set) {
                    set.elements.extend(elements.iter().cloned());
                }
            }
            NftChange::DeleteElements { set, elements } => {
                if let Some(set) = self.sets.get_mut(set) {
                    set.elements.retain(|element| !elements.contains(element));
                }
            }
            NftChange::DeleteForeignElements { set, elements } => {
                let foreign = match (self.sets.get_mut(set), self.maps.get_mut(set)) {
                    (Some(set), _) => Some(&mut set.foreign),
                    (None, map) => map.map(|map| &mut map.foreign),
                };
                if let Some(foreign) = foreign {
                    foreign.retain(|element| !elements.contains(element));
                }
            }
            NftChange::AddMap { name, map } | NftChange::ReplaceMap { name, map } => {
                let table = NftTable { maps: [(name.clone(), map.clone())].into(), ..NftTable::default() };
                self.maps.extend(Self::of(&table).maps);
            }
            NftChange::AddMappings { map, elements } => {
                if let Some(map) = self.maps.get_mut(map) {
                    map.elements.extend(elements);
                }
            }
            NftChange::DeleteMappings { map, elements } => {
                if let Some(map) = self.maps.get_mut(map) {
                    map.elements.retain(|key, _| !elements.contains_key(key));
                }
            }
            NftChange::AddChain { name, chain } | NftChange::ReplaceChain { name, chain, .. } => {
                let table = NftTable { chains: [(name.clone(), chain.clone())].into(), ..NftTable::default() };
                self.chains.extend(Self::of(&table).chains);
            }
            NftChange::RebuildChain { name, rules, .. } => {
                if let Some(ActualChain { rules: present, .. }) = self.chains.get_mut(name) {
                    *present = rules.iter().map(|rule| Some(compile::rule_comment(rule))).collect();
                }
            }
            NftChange::DeleteChain { name } => {
                self.chains.remove(name);
            }
            NftChange::DeleteObject { kind, name } => match kind.as_str() {
                "counter" => {
                    self.counters.remove(name);
                }
                "set" => {
                    self.sets.remove(name);
                }
                "map" => {
                    self.maps.remove(name);
                }
                _ => self.foreign.retain(|it| it != &(kind.clone(), name.clone())),
            },
        }
    }
}
