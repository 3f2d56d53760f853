-- What ended has been written into the log: its notes go.
--
-- KEYS  1 keeper   2 ended   ARGV  1 "holder epoch"   2.. notes
-- Answer  how many went
-- Errors  FENCED   another worker looks after the app; nothing is removed
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return redis.error_reply('FENCED') end
local gone = 0
for i = 2, #ARGV do gone = gone + redis.call('ZREM', KEYS[2], ARGV[i]) end
return gone
